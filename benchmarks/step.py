"""A full contrastive training step, without a cache: ours, open_clip's, and big_vision's modules.

.venv-peers/bin/python benchmarks/step.py --model {clip-b32,siglip-ti16} [--dtype bfloat16]
    [--big-vision CHECKOUT] [--rounds 5] [--output FILE.json]
.venv/bin/python benchmarks/step.py --against CHECKOUT [--rounds 5]

clip-b32 is ViT-B/32 at 224 pixels and a 12-layer text tower of width 512 with 77 tokens, trained
with the softmax loss. siglip-ti16 is ViT-Ti/16 at 224 pixels and a Ti text tower with 64 tokens,
trained with the sigmoid loss. The weights are random, and the optimizer is AdamW. Each variant has
a separate process, and every round times all variants in turn.

--dtype is the type of matrix-product operands. In open_clip, autocast sets it; in big_vision, the
field `dtype_mm` does. The text tower of big_vision lacks this field, so it remains in float32.
With --against, only our step is timed, in this checkout and in another one.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from checkouts import compare_runs, format_comparison
from peers import add_big_vision, open_clip
from side_by_side import Run, build_parser, format_table, time_in_processes, write_results

from imgtune_jax import models, objectives
from imgtune_jax.training.optim import Optimizer
from imgtune_jax.training.step import make_train_step
from imgtune_jax.types import Batch, TrainState


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model's towers. `sigmoid` selects SigLIP's towers and loss, else CLIP's."""

    patch_size: int
    width: int
    num_heads: int
    text_width: int
    text_heads: int
    length: int
    vocab_size: int
    embed_dim: int
    sigmoid: bool
    depth: int = 12
    image_size: int = 224


MODELS = {
    "clip-b32": Sizes(32, 768, 12, 512, 8, 77, 49408, 512, sigmoid=False),
    "siglip-ti16": Sizes(16, 192, 3, 192, 3, 64, 32000, 192, sigmoid=True),
}
LEARNING_RATE = 1e-4


def our_model(sizes: Sizes, dtype: str) -> models.ImageTextModel:
    """Build CLIP's towers for the softmax loss, or SigLIP's for the sigmoid loss."""
    causal = dict(causal=True, pool="eot") if not sizes.sigmoid else dict(causal=False, pool="last")
    act = "gelu_tanh" if sizes.sigmoid else "gelu"  # as in SigLIP and CLIP
    image = dict(
        name="vit",
        width=sizes.width,
        depth=sizes.depth,
        mlp_dim=4 * sizes.width,
        num_heads=sizes.num_heads,
        patch_size=sizes.patch_size,
        pre_norm=not sizes.sigmoid,
        class_token=not sizes.sigmoid,
        pool="attention" if sizes.sigmoid else "cls",
        act=act,
    )
    text = dict(
        name="text_transformer",
        width=sizes.text_width,
        depth=sizes.depth,
        mlp_dim=4 * sizes.text_width,
        num_heads=sizes.text_heads,
        max_length=sizes.length,
        vocab_size=sizes.vocab_size,
        mask_padding=not sizes.sigmoid,
        act=act,
        **causal,
    )
    return models.build_model(
        dict(
            image=image,
            text=text,
            embed_dim=sizes.embed_dim,
            image_size=sizes.image_size,
            logit_bias_init=-10.0 if sizes.sigmoid else None,
            dtype=dtype,
        )
    )


def ours(sizes: Sizes, batch_size: int, dtype: str) -> Run:
    """Build our training step; its first call compiles it."""
    model = our_model(sizes, dtype)
    tx = optax.adamw(LEARNING_RATE)
    optimizer = Optimizer(tx=tx, schedule=optax.constant_schedule(LEARNING_RATE))
    objective = objectives.build_objective(
        {"sigmoid" if sizes.sigmoid else "softmax": dict(weight=1.0)}
    )

    def forward(params: Any, batch: Batch, rng: jax.Array) -> Any:
        return model.apply(params, batch, rng=rng, train=True)

    step = jax.jit(
        make_train_step(forward, objective, optimizer, key=jax.random.key(1)), donate_argnums=0
    )
    image, ids = make_inputs(sizes, batch_size)
    batch = Batch(jnp.ones(batch_size, bool), text=ids, text_mask=ids >= 0, image=image)
    params = model.init(jax.random.key(0))
    state = [TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))]

    def run() -> object:
        state[0], metrics = step(state[0], {}, batch)
        return metrics

    return run


def make_inputs(sizes: Sizes, batch_size: int) -> tuple[Any, jax.Array]:
    """Return random images u8[b h w 3] and token ids i32[b l]."""
    rng = np.random.default_rng(0)
    shape = (batch_size, sizes.image_size, sizes.image_size, 3)
    ids = rng.integers(1, sizes.vocab_size, (batch_size, sizes.length))
    return jnp.asarray(rng.integers(0, 256, shape), jnp.uint8), jnp.asarray(ids, jnp.int32)


def open_clip_step(sizes: Sizes, batch_size: int, dtype: str) -> Run:
    """Build a training step as in open_clip's trainer, but without a gradient scaler."""
    library = open_clip()
    import torch

    torch.manual_seed(0)
    vision = dict(
        layers=sizes.depth,
        width=sizes.width,
        head_width=sizes.width // sizes.num_heads,
        patch_size=sizes.patch_size,
        image_size=sizes.image_size,
    )
    text = dict(
        context_length=sizes.length,
        vocab_size=sizes.vocab_size,
        width=sizes.text_width,
        heads=sizes.text_heads,
        layers=sizes.depth,
    )
    bias = dict(init_logit_bias=-10.0) if sizes.sigmoid else {}
    if sizes.sigmoid:
        tanh = dict(act_kwargs=dict(approximate="tanh"))
        vision |= dict(attentional_pool=False, pool_type="avg", **tanh)
        text |= dict(no_causal_mask=True, pool_type="last", **tanh)
    model = library.CLIP(sizes.embed_dim, vision, text, **bias)
    model.train()
    loss = library.loss.SigLipLoss() if sizes.sigmoid else library.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    image = torch.randn(batch_size, 3, sizes.image_size, sizes.image_size)
    ids = torch.randint(1, sizes.vocab_size, (batch_size, sizes.length))

    def run() -> object:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            value = loss(*model(image, ids))
        value.backward()
        optimizer.step()
        return None

    return run


def big_vision_model(sizes: Sizes, dtype: str, checkout: Path) -> Any:
    """Build big_vision's two-tower module."""
    add_big_vision(checkout)
    from big_vision.models.proj.image_text import two_towers  # pyright: ignore

    image = dict(
        width=sizes.width,
        depth=sizes.depth,
        mlp_dim=4 * sizes.width,
        num_heads=sizes.num_heads,
        patch_size=(sizes.patch_size, sizes.patch_size),
        pool_type="map" if sizes.sigmoid else "tok",
        dtype_mm=dtype,
    )
    text = dict(
        width=sizes.text_width,
        depth=sizes.depth,
        mlp_dim=4 * sizes.text_width,
        num_heads=sizes.text_heads,
        vocab_size=sizes.vocab_size,
    )
    return two_towers.Model(
        image=image,
        text=text,
        out_dim=sizes.embed_dim,
        temperature_init=10.0,
        bias_init=-10.0 if sizes.sigmoid else None,
    )


def big_vision_step(sizes: Sizes, batch_size: int, dtype: str, checkout: Path) -> Run:
    """Build a step with big_vision's two-tower module. The loss is implemented here."""
    model = big_vision_model(sizes, dtype, checkout)
    pixels, ids = make_inputs(sizes, batch_size)
    image = pixels.astype(jnp.float32) / 127.5 - 1
    tx = optax.adamw(LEARNING_RATE)

    def loss(params: Any) -> jax.Array:
        image_emb, text_emb, out = model.apply({"params": params}, image, ids, train=True)
        logits = image_emb @ text_emb.T * out["t"]
        if sizes.sigmoid:
            sign = 2 * jnp.eye(batch_size) - 1
            return -jnp.sum(jax.nn.log_sigmoid(sign * (logits + out["b"])), -1).mean()
        diagonal = jnp.arange(batch_size)
        image_to_text = jax.nn.log_softmax(logits, 1)[diagonal, diagonal].mean()
        text_to_image = jax.nn.log_softmax(logits, 0)[diagonal, diagonal].mean()
        return -(image_to_text + text_to_image) / 2

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params = jax.jit(model.init)(jax.random.key(0), image, ids)["params"]
    state = [(params, tx.init(params))]

    def run() -> object:
        *new_state, value = step(*state[0])
        state[0] = tuple(new_state)
        return value

    return run


def main() -> None:
    """Time all variants, one after another in every round, and print a table."""
    parser = build_parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="clip-b32")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--big-vision", type=Path, help="a checkout of google-research/big_vision")
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    args = parser.parse_args()
    settings = dict(model=args.model, dtype=args.dtype, batch_size=args.batch_size)
    print(f"\n{args.model}, batch {args.batch_size}, {args.dtype}\n")
    if args.against:
        build = f"step.ours(step.MODELS[{args.model!r}], {args.batch_size}, {args.dtype!r})"
        times = compare_runs("step", build, args.against, args.rounds)
        print(format_comparison({"step": times}))
        return write_results(args.output, **settings, seconds=times)
    arguments = (MODELS[args.model], args.batch_size, args.dtype)
    variants: dict[str, Any] = {
        "ours": (ours, arguments),
        "open_clip": (open_clip_step, arguments),
    }
    if args.big_vision:
        variants["big_vision modules"] = (big_vision_step, (*arguments, args.big_vision))
    measurements = time_in_processes(variants, args.rounds)
    print(format_table(measurements.times, "ours", measurements.memory))
    write_results(args.output, **settings, seconds=measurements.times, memory=measurements.memory)


if __name__ == "__main__":
    main()
