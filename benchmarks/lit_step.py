"""A training step with the image tower locked: uncached, cached, and open_clip's --lock-image.

.venv-peers/bin/python benchmarks/lit_step.py [--variant B/16] [--batch-size 32] [--tokens 16]
    [--open-clip bfloat16 float32] [--rounds 5] [--output FILE.json]
.venv/bin/python benchmarks/lit_step.py --count [--batch-size 32] [--tokens 16]

One process an arm, one round after another: ours uncached and cached, open_clip in bfloat16 and
float32. Random weights, AdamW. Prints medians over the rounds in seconds, and the job that they
make: so many epochs, the first of which fills the cache on its way. Beside them the ratio that the
floating-point operations alone give, counted by the compiler. Without open_clip installed (make
test-peers installs it), or for a pair of towers that open_clip has not, ours alone. With --count,
the operations of all pairs of towers, and nothing is timed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from peers import open_clip
from side_by_side import Run, arguments, in_processes, medians, table, write

from imgtune_jax import models, objectives
from imgtune_jax.training.optim import Optimizer
from imgtune_jax.training.step import make_train_step
from imgtune_jax.types import Batch, TrainState

VARIANTS = {  # open_clip's name, image tower, pixels, text width, heads, embedding
    "B/32": ("ViT-B-32", "B/32", 224, 512, 8, 512),
    "B/16": ("ViT-B-16", "B/16", 224, 512, 8, 512),
    "L/14": ("ViT-L-14", "L/14", 224, 768, 12, 768),
    "L/14-336": ("ViT-L-14-336", "L/14", 336, 768, 12, 768),
    "So400m/14-384": (None, "So400m/14", 384, 768, 12, 768),
    "g/14-288": (None, "g/14", 288, 1024, 16, 1024),
}
TYPES = ("bfloat16", "float32")
VOCABULARY, TEXT_DEPTH = 49408, {1024: 24}  # by width; 12 else


def build(variant: str, length: int, dtype: str) -> tuple[models.ImageTextModel, Any, Any]:
    """The model with its image tower locked, its optimizer, and the jitted step."""
    _, tower, pixels, width, heads, embed = VARIANTS[variant]
    text = dict(width=width, depth=TEXT_DEPTH.get(width, 12), mlp_dim=4 * width, num_heads=heads)
    model = models.build_model(
        dict(
            image=dict(name="vit", variant=tower, pre_norm=True),
            text=dict(name="text_transformer", max_length=length, **text),
            embed_dim=embed,
            image_size=pixels,
            dtype=dtype,
        )
    ).freeze(lambda path: path.startswith("image/"))
    tx = optax.adamw(1e-4)
    optimizer = Optimizer(tx=tx, schedule=optax.constant_schedule(1e-4))
    objective = objectives.build_objective({"softmax": dict(weight=1.0)})

    def forward(params: Any, batch: Batch, rng: jax.Array) -> Any:
        return model.apply(params, batch, rng=rng, train=True)

    step = make_train_step(forward, objective, optimizer, key=jax.random.key(1))
    return model, tx, jax.jit(step, donate_argnums=0)


def inputs(model: models.ImageTextModel, batch_size: int, length: int, part: str) -> Batch:
    """Random pictures and texts; for "cached", what the locked tower would give of the pictures."""
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, VOCABULARY, (batch_size, length)), jnp.int32)
    batch = Batch(jnp.ones(batch_size, bool), text=ids, text_mask=ids >= 0)
    if part == "cached":
        features = rng.normal(size=(batch_size, model.feature_dim("image")))
        return batch.replace(image_features=jnp.asarray(features, jnp.float32))
    shape = (batch_size, model.image_size, model.image_size, 3)
    return batch.replace(image=jnp.asarray(rng.integers(0, 256, shape), jnp.uint8))


def split(params: Any, part: str) -> tuple[Any, Any]:
    """(trained, frozen). The cached step has no frozen parameters at all."""
    trained = {k: v for k, v in params.items() if k != "image"}
    return trained, {} if part == "cached" else {"image": params["image"]}


def ours(variant: str, batch_size: int, length: int, dtype: str, part: str) -> Run:
    """The "uncached" or the "cached" step, or the locked "front" alone."""
    model, tx, step = build(variant, length, dtype)
    batch = inputs(model, batch_size, length, part)
    trained, frozen = split(model.init(jax.random.key(0)), part)
    if part == "front":
        front = jax.jit(lambda p, b: model.apply_frozen_prefix(p, tower="image", batch=b))
        return lambda: front(frozen, batch)
    state = [TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained))]

    def run() -> object:
        state[0], metrics = step(state[0], frozen, batch)
        return metrics

    return run


def operations(variant: str, batch_size: int, length: int, part: str) -> float:
    """Floating-point operations of a step, counted by the compiler without running it."""
    model, tx, step = build(variant, length, "float32")
    batch = inputs(model, batch_size, length, part)
    trained, frozen = split(model.abstract_params(), part)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), trained, jax.eval_shape(tx.init, trained)
    )
    return step.lower(state, frozen, batch).cost_analysis()["flops"]


def open_clip_step(variant: str, batch_size: int, length: int, bf16: bool) -> Run:
    """One step of open_clip with its image tower locked, as `--lock-image` does it."""
    library = open_clip()
    import torch

    name, _, pixels, *_ = VARIANTS[variant]
    config = library.get_model_config(name)
    config["text_cfg"]["context_length"] = length
    torch.manual_seed(0)
    model = library.CLIP(**config)
    model.lock_image_tower()
    model.train()
    loss = library.ClipLoss()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    image = torch.randn(batch_size, 3, pixels, pixels)
    ids = torch.randint(1, VOCABULARY, (batch_size, length))

    def run() -> object:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            image_emb, text_emb, scale = model(image, ids)[:3]
            value = loss(image_emb, text_emb, scale)
        value.backward()
        optimizer.step()
        return None

    return run


def counted(batch_size: int, length: int) -> str:
    """A Markdown table of what the compiler counts for every pair of towers."""
    lines = ["| | TFLOP a step, uncached | cached | ratio |", "|---|---|---|---|"]
    for variant in VARIANTS:
        given = (variant, batch_size, length)
        uncached, cached = (operations(*given, part) / 1e12 for part in ("uncached", "cached"))
        lines.append(f"| {variant} | {uncached:.2f} | {cached:.3f} | {uncached / cached:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Time all arms, interleaved, and print two tables."""
    parser = arguments(__doc__)
    parser.add_argument("--variant", choices=VARIANTS, default="B/16")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16, help="length of a text")
    parser.add_argument("--dtype", choices=TYPES, default="float32")
    parser.add_argument("--open-clip", nargs="+", choices=TYPES, default=TYPES, help="its dtypes")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--count", action="store_true", help="operations alone, of all variants")
    o = parser.parse_args()
    if o.count:
        return print(
            f"\nbatch {o.batch_size}, {o.tokens} tokens\n\n{counted(o.batch_size, o.tokens)}"
        )
    given = (o.variant, o.batch_size, o.tokens)
    arms: dict[str, Any] = {
        part: (ours, (*given, o.dtype, part)) for part in ("cached", "uncached", "front")
    }
    if VARIANTS[o.variant][0] is not None:
        for dtype in o.open_clip:
            arms[f"open_clip --lock-image, {dtype}"] = (open_clip_step, (*given, dtype == TYPES[0]))
    times = in_processes(arms, o.rounds).times
    ratio = operations(*given, "uncached") / operations(*given, "cached")
    m = medians(times)
    first = m["front"] + m["cached"]  # a step that fills the cache
    jobs = {
        "uncached": o.epochs * m["uncached"],
        "cached, filled on the way": first + (o.epochs - 1) * m["cached"],
        "cached, by another run": o.epochs * m["cached"],
    }
    print(f"\n{o.variant}, batch {o.batch_size}, {o.tokens} tokens, ours in {o.dtype}\n")
    print(table(times, "cached"))
    print(f"\nOperations of the uncached step over those of the cached one: {ratio:.1f}")
    print(f"\n| {o.epochs} epochs | s a batch | times faster than uncached |\n|---|---|---|")
    for name, seconds in jobs.items():
        print(f"| {name} | {seconds:.1f} | {jobs['uncached'] / seconds:.1f} |")
    settings = dict(variant=o.variant, batch_size=o.batch_size, tokens=o.tokens, dtype=o.dtype)
    write(
        o.output,
        **settings,
        seconds=times,
        jobs=jobs,
        operations_ratio=ratio,
    )


if __name__ == "__main__":
    main()
