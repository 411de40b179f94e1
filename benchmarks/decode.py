"""Caption generation: ours with a cache of keys and values, ours without it, and open_clip's.

.venv-peers/bin/python benchmarks/decode.py [--length 64] [--batch-size 8] [--rounds 5]
    [--variants VARIANT ...] [--output FILE.json]

Each variant generates `length` tokens for each image; no end token stops it early. The model has
the sizes of open_clip's coca_ViT-B-32, random weights, and float32. Each variant has a separate
process, and every round times all variants in turn.

The variants without a cache ("recomputed" and open_clip) run the image tower once, and for every
new token the decoder on all earlier ones. Ours pads these to the next multiple of 8, and computes
logits only for the last position. If open_clip is not installed (make test-peers installs it),
only ours runs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from peers import open_clip
from side_by_side import (
    Run,
    build_parser,
    format_table,
    medians,
    time_in_processes,
    write_results,
)

from imgtune_jax import interop, models
from imgtune_jax.decoding import BeamSearch, GenerationConfig, Generator, Greedy, pad_prompts

VARIANTS = ("cached, greedy", "cached, beam of 4", "recomputed, greedy", "open_clip, greedy")
BEGIN, END, BLOCK = 49406, 49407, 8
TEXT = dict(context_length=76, vocab_size=49408, width=512, heads=8, layers=12)
SIZES = dict(
    embed_dim=512,
    vision_cfg=dict(
        image_size=224,
        layers=12,
        width=768,
        patch_size=32,
        attentional_pool=True,
        attn_pooler_heads=8,
        output_tokens=True,
    ),
    text_cfg=dict(**TEXT, embed_cls=True, output_tokens=True),
    multimodal_cfg=TEXT,
)


def images(batch_size: int) -> np.ndarray:
    """Return random uint8 RGB images."""
    shape = (batch_size, 224, 224, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def build_model() -> tuple[models.ImageTextModel, Any]:
    """Return the model and random parameters."""
    model = models.build_model(interop.config_from_open_clip(SIZES))
    return model, model.init(jax.random.key(0))


def cached(batch_size: int, length: int, method: Greedy | BeamSearch) -> Run:
    """Build a generator of our model with a cache."""
    model, params = build_model()
    settings = GenerationConfig(
        stop_ids=(END,), max_new_tokens=length, min_new_tokens=length - 1, method=method
    )
    generator = Generator(
        model.decoder_cache, model.decode_step, settings, max_positions=model.decoder.max_length
    )
    encode = jax.jit(model.image_tokens)
    image, prompts = images(batch_size), pad_prompts([[BEGIN]] * batch_size)
    return lambda: generator(params, encode(params, image), *prompts)


def recomputed(batch_size: int, length: int) -> Run:
    """Build a greedy generator of the same model that reads all earlier tokens for each new one."""
    model, params = build_model()
    encode, image = jax.jit(model.image_tokens), images(batch_size)

    @functools.partial(jax.jit, static_argnames="width")
    def extend(params: Any, tokens: jax.Array, ids: jax.Array, *, width: int) -> jax.Array:
        """Generate BLOCK tokens; the last one attends to `width` tokens, begin token included."""
        mask = jnp.ones((batch_size, width), bool)

        def append_token(position: jax.Array, ids: jax.Array) -> jax.Array:
            text = model.apply_component(params, "text", ids[:, :width], mask).tokens
            hidden = model.apply_component(params, "decoder", text, tokens)[:, position]
            logits = hidden @ model.decoder.vocab_weights(params["decoder"])[0]
            return ids.at[:, position + 1].set(jnp.argmax(logits, -1).astype(ids.dtype))

        return jax.lax.fori_loop(width - BLOCK, width, append_token, ids)

    def run() -> jax.Array:
        tokens = encode(params, image)
        ids = jnp.full((batch_size, length + 1), BEGIN, jnp.int32)
        for width in range(BLOCK, length + 1, BLOCK):
            ids = extend(params, tokens, ids, width=width)
        return ids

    return run


def open_clip_greedy(batch_size: int, length: int) -> Run:
    """Build open_clip's `generate` with top_k = 1."""
    open_clip()
    import torch
    import transformers
    from open_clip import coca_model

    if not coca_model._has_transformers:
        # With Transformers 5, open_clip imports none of these classes, because the version has no
        # BeamSearchScorer. Generation with top_k needs only these.
        for name in (
            *("LogitsProcessorList", "MinLengthLogitsProcessor", "MaxLengthCriteria"),
            *("RepetitionPenaltyLogitsProcessor", "StoppingCriteriaList"),
        ):
            setattr(coca_model, name, getattr(transformers, name))
        coca_model.GENERATION_TYPES["top_k"] = transformers.TopKLogitsWarper
        coca_model._has_transformers = True
    torch.manual_seed(0)
    model = coca_model.CoCa(**SIZES).eval()
    pixels = torch.from_numpy(images(batch_size).transpose(0, 3, 1, 2)).float() / 255
    options = dict(generation_type="top_k", top_k=1, seq_len=length + 1, min_seq_len=length)
    return lambda: model.generate(pixels, **options).numpy()


def main() -> None:
    """Time all variants, one after another in every round, and print a table."""
    parser = build_parser(__doc__)
    parser.add_argument("--length", type=int, default=64, help=f"a multiple of {BLOCK}, up to 72")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    args = parser.parse_args()
    arguments = (args.batch_size, args.length)
    variants = {
        "cached, greedy": (cached, (*arguments, Greedy())),
        "cached, beam of 4": (cached, (*arguments, BeamSearch(width=4))),
        "recomputed, greedy": (recomputed, arguments),
        "open_clip, greedy": (open_clip_greedy, arguments),
    }
    selected = {name: variants[name] for name in VARIANTS if name in args.variants}
    times = time_in_processes(selected, args.rounds).times
    rates = {name: args.batch_size * args.length / s for name, s in medians(times).items()}
    print(f"\ncoca_ViT-B-32, batch {args.batch_size}, {args.length} tokens\n")
    print(format_table(times, "cached, greedy"))
    print("\n| | tokens/s |\n|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} |")
    settings = dict(batch_size=args.batch_size, length=args.length)
    write_results(args.output, **settings, seconds=times, tokens_per_second=rates)


if __name__ == "__main__":
    main()
