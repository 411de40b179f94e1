"""Captions by cached decoding, by recomputing the prefix at every token, and by open_clip.

.venv-peers/bin/python benchmarks/decode.py [--length 64] [--batch-size 8] [--rounds 5]
    [--arms ARM ...] [--output FILE.json]

One process an arm, one round after another, of the sizes of open_clip's coca_ViT-B-32 with random
weights, in float32: from images to `length` new tokens each, which no end token cuts short. What
recomputes runs the image tower once and the decoder over the whole prefix for every token; ours
pads the prefix to the next multiple of 8, and takes logits of its last position alone. Without
open_clip installed (make test-peers installs it), ours alone.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from peers import open_clip
from side_by_side import Run, arguments, in_processes, medians, table, write

from imgtune_jax import interop, models
from imgtune_jax.decoding import BeamSearch, GenerationConfig, Generator, Greedy, pad_prompts

ARMS = ("cached, greedy", "cached, beam of 4", "recomputed, greedy", "open_clip, greedy")
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
    """uint8 RGB."""
    shape = (batch_size, 224, 224, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def build() -> tuple[models.ImageTextModel, Any]:
    """The model and random parameters."""
    model = models.build_model(interop.config_from_open_clip(SIZES))
    return model, model.init(jax.random.key(0))


def cached(batch_size: int, length: int, method: Greedy | BeamSearch) -> Run:
    """This codebase's way."""
    model, params = build()
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
    """The same model, greedy, reading the prefix again for every token."""
    model, params = build()
    encode, image = jax.jit(model.image_tokens), images(batch_size)

    @functools.partial(jax.jit, static_argnames="width")
    def extend(params: Any, tokens: jax.Array, ids: jax.Array, *, width: int) -> jax.Array:
        """Fill BLOCK places, the last one of which reads `width` tokens."""
        mask = jnp.ones((batch_size, width), bool)

        def one(at: jax.Array, ids: jax.Array) -> jax.Array:
            text = model.apply_component(params, "text", ids[:, :width], mask).tokens
            hidden = model.apply_component(params, "decoder", text, tokens)[:, at]
            logits = hidden @ model.decoder.vocab_kernel(params["decoder"])
            return ids.at[:, at + 1].set(jnp.argmax(logits, -1).astype(ids.dtype))

        return jax.lax.fori_loop(width - BLOCK, width, one, ids)

    def run() -> jax.Array:
        tokens = encode(params, image)
        ids = jnp.full((batch_size, length + 1), BEGIN, jnp.int32)
        for width in range(BLOCK, length + 1, BLOCK):
            ids = extend(params, tokens, ids, width=width)
        return ids

    return run


def open_clip_greedy(batch_size: int, length: int) -> Run:
    """open_clip's `generate` with top_k = 1."""
    open_clip()
    import torch
    import transformers
    from open_clip import coca_model

    if not coca_model._has_transformers:  # it asks for a BeamSearchScorer, which is gone since 5
        for need in (
            *("LogitsProcessorList", "MinLengthLogitsProcessor", "MaxLengthCriteria"),
            *("RepetitionPenaltyLogitsProcessor", "StoppingCriteriaList"),
        ):
            setattr(coca_model, need, getattr(transformers, need))
        coca_model.GENERATION_TYPES["top_k"] = transformers.TopKLogitsWarper
        coca_model._has_transformers = True
    torch.manual_seed(0)
    model = coca_model.CoCa(**SIZES).eval()
    pixels = torch.from_numpy(images(batch_size).transpose(0, 3, 1, 2)).float() / 255
    options = dict(generation_type="top_k", top_k=1, seq_len=length + 1, min_seq_len=length)
    return lambda: model.generate(pixels, **options).numpy()


def main() -> None:
    """Time all arms, interleaved, and print a table."""
    parser = arguments(__doc__)
    parser.add_argument("--length", type=int, default=64, help=f"a multiple of {BLOCK}, up to 72")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    o = parser.parse_args()
    given = (o.batch_size, o.length)
    arms = {
        "cached, greedy": (cached, (*given, Greedy())),
        "cached, beam of 4": (cached, (*given, BeamSearch(width=4))),
        "recomputed, greedy": (recomputed, given),
        "open_clip, greedy": (open_clip_greedy, given),
    }
    times = in_processes({arm: arms[arm] for arm in ARMS if arm in o.arms}, o.rounds).times
    rates = {name: o.batch_size * o.length / s for name, s in medians(times).items()}
    print(f"\ncoca_ViT-B-32, batch {o.batch_size}, {o.length} tokens\n")
    print(table(times, "cached, greedy"))
    print("\n| | tokens/s |\n|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} |")
    settings = dict(batch_size=o.batch_size, length=o.length)
    write(o.output, **settings, seconds=times, tokens_per_second=rates)


if __name__ == "__main__":
    main()
