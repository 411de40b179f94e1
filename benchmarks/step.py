"""A full contrastive training step: ours, open_clip's, and one with big_vision's modules.

.venv-peers/bin/python benchmarks/step.py --model {clip-b32,siglip-ti16} [--dtype bfloat16]
    [--big-vision CHECKOUT] [--rounds 5] [--output FILE.json]
.venv/bin/python benchmarks/step.py --against CHECKOUT [--rounds 5]

clip-b32: ViT-B/32 at 224 pixels and a 12-layer text tower of width 512 with 77 tokens, softmax.
siglip-ti16: ViT-Ti/16 at 224 pixels and a Ti text tower with 64 tokens, sigmoid. Random weights,
AdamW; one process per variant, in interleaved rounds. bfloat16 is the type of matrix-product
operands: in open_clip by autocast, in big_vision by its `dtype_mm` (which its text tower lacks, so
that remains float32). With --against, only our step is timed, in this checkout and in another one.
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
    """Sizes of the two towers of a model."""

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


def our_model(s: Sizes, dtype: str) -> models.ImageTextModel:
    """Build CLIP's towers (softmax) or SigLIP's (sigmoid)."""
    causal = dict(causal=True, pool="eot") if not s.sigmoid else dict(causal=False, pool="last")
    act = "gelu_tanh" if s.sigmoid else "gelu"  # as in SigLIP and CLIP
    image = dict(
        name="vit",
        width=s.width,
        depth=s.depth,
        mlp_dim=4 * s.width,
        num_heads=s.num_heads,
        patch_size=s.patch_size,
        pre_norm=not s.sigmoid,
        class_token=not s.sigmoid,
        pool="attention" if s.sigmoid else "cls",
        act=act,
    )
    text = dict(
        name="text_transformer",
        width=s.text_width,
        depth=s.depth,
        mlp_dim=4 * s.text_width,
        num_heads=s.text_heads,
        max_length=s.length,
        vocab_size=s.vocab_size,
        mask_padding=not s.sigmoid,
        act=act,
        **causal,
    )
    return models.build_model(
        dict(
            image=image,
            text=text,
            embed_dim=s.embed_dim,
            image_size=s.image_size,
            logit_bias_init=-10.0 if s.sigmoid else None,
            dtype=dtype,
        )
    )


def ours(s: Sizes, batch_size: int, dtype: str) -> Run:
    """Build our training step; its first call compiles it."""
    model = our_model(s, dtype)
    tx = optax.adamw(LEARNING_RATE)
    optimizer = Optimizer(tx=tx, schedule=optax.constant_schedule(LEARNING_RATE))
    objective = objectives.build_objective(
        {"sigmoid" if s.sigmoid else "softmax": dict(weight=1.0)}
    )

    def forward(params: Any, batch: Batch, rng: jax.Array) -> Any:
        return model.apply(params, batch, rng=rng, train=True)

    step = jax.jit(
        make_train_step(forward, objective, optimizer, key=jax.random.key(1)), donate_argnums=0
    )
    image, ids = make_inputs(s, batch_size)
    batch = Batch(jnp.ones(batch_size, bool), text=ids, text_mask=ids >= 0, image=image)
    params = model.init(jax.random.key(0))
    state = [TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))]

    def run() -> object:
        state[0], metrics = step(state[0], {}, batch)
        return metrics

    return run


def make_inputs(s: Sizes, batch_size: int) -> tuple[Any, jax.Array]:
    """Return random images u8[b h w 3] and token ids i32[b l]."""
    rng = np.random.default_rng(0)
    shape = (batch_size, s.image_size, s.image_size, 3)
    ids = rng.integers(1, s.vocab_size, (batch_size, s.length))
    return jnp.asarray(rng.integers(0, 256, shape), jnp.uint8), jnp.asarray(ids, jnp.int32)


def open_clip_step(s: Sizes, batch_size: int, dtype: str) -> Run:
    """Build a step as in open_clip's trainer, without its gradient scaler."""
    library = open_clip()
    import torch

    torch.manual_seed(0)
    vision = dict(
        layers=s.depth,
        width=s.width,
        head_width=s.width // s.num_heads,
        patch_size=s.patch_size,
        image_size=s.image_size,
    )
    text = dict(
        context_length=s.length,
        vocab_size=s.vocab_size,
        width=s.text_width,
        heads=s.text_heads,
        layers=s.depth,
    )
    bias = dict(init_logit_bias=-10.0) if s.sigmoid else {}
    if s.sigmoid:
        tanh = dict(act_kwargs=dict(approximate="tanh"))
        vision |= dict(attentional_pool=False, pool_type="avg", **tanh)
        text |= dict(no_causal_mask=True, pool_type="last", **tanh)
    model = library.CLIP(s.embed_dim, vision, text, **bias)
    model.train()
    loss = library.loss.SigLipLoss() if s.sigmoid else library.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    image = torch.randn(batch_size, 3, s.image_size, s.image_size)
    ids = torch.randint(1, s.vocab_size, (batch_size, s.length))

    def run() -> object:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            value = loss(*model(image, ids))
        value.backward()
        optimizer.step()
        return None

    return run


def big_vision_model(s: Sizes, dtype: str, checkout: Path) -> Any:
    """Build big_vision's two-tower module."""
    add_big_vision(checkout)
    from big_vision.models.proj.image_text import two_towers  # pyright: ignore

    image = dict(
        width=s.width,
        depth=s.depth,
        mlp_dim=4 * s.width,
        num_heads=s.num_heads,
        patch_size=(s.patch_size, s.patch_size),
        pool_type="map" if s.sigmoid else "tok",
        dtype_mm=dtype,
    )
    text = dict(
        width=s.text_width,
        depth=s.depth,
        mlp_dim=4 * s.text_width,
        num_heads=s.text_heads,
        vocab_size=s.vocab_size,
    )
    return two_towers.Model(
        image=image,
        text=text,
        out_dim=s.embed_dim,
        temperature_init=10.0,
        bias_init=-10.0 if s.sigmoid else None,
    )


def big_vision_step(s: Sizes, batch_size: int, dtype: str, checkout: Path) -> Run:
    """Build a step with big_vision's two-tower module; its loss is written out here."""
    model = big_vision_model(s, dtype, checkout)
    pixels, ids = make_inputs(s, batch_size)
    image = pixels.astype(jnp.float32) / 127.5 - 1
    tx = optax.adamw(LEARNING_RATE)

    def loss(params: Any) -> jax.Array:
        img, txt, out = model.apply({"params": params}, image, ids, train=True)
        logits = img @ txt.T * out["t"]
        if s.sigmoid:
            sign = 2 * jnp.eye(batch_size) - 1
            return -jnp.sum(jax.nn.log_sigmoid(sign * (logits + out["b"])), -1).mean()
        diagonal = jnp.arange(batch_size)
        rows = jax.nn.log_softmax(logits, 1)[diagonal, diagonal].mean()
        return -(rows + jax.nn.log_softmax(logits, 0)[diagonal, diagonal].mean()) / 2

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
    """Time all variants in interleaved rounds and print a table."""
    parser = build_parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="clip-b32")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--big-vision", type=Path, help="a checkout of google-research/big_vision")
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    o = parser.parse_args()
    settings = dict(model=o.model, dtype=o.dtype, batch_size=o.batch_size)
    print(f"\n{o.model}, batch {o.batch_size}, {o.dtype}\n")
    if o.against:
        build = f"step.ours(step.MODELS[{o.model!r}], {o.batch_size}, {o.dtype!r})"
        times = compare_runs("step", build, o.against, o.rounds)
        print(format_comparison({"step": times}))
        return write_results(o.output, **settings, seconds=times)
    arguments = (MODELS[o.model], o.batch_size, o.dtype)
    variants: dict[str, Any] = {
        "ours": (ours, arguments),
        "open_clip": (open_clip_step, arguments),
    }
    if o.big_vision:
        variants["big_vision modules"] = (big_vision_step, (*arguments, o.big_vision))
    measurements = time_in_processes(variants, o.rounds)
    print(format_table(measurements.times, "ours", measurements.memory))
    write_results(o.output, **settings, seconds=measurements.times, memory=measurements.memory)


if __name__ == "__main__":
    main()
