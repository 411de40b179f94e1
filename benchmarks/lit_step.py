"""A training step with the image tower locked: uncached, cached, and open_clip's --lock-image.

.venv-peers/bin/python benchmarks/lit_step.py [--variant B/16] [--batch-size 32] [--tokens 16]
    [--open-clip bfloat16 float32] [--rounds 5] [--output FILE.json]
.venv/bin/python benchmarks/lit_step.py --count [--batch-size 32] [--tokens 16]

The cases are ours uncached and cached, ours with only the locked tower ("frozen prefix"), and
open_clip in bfloat16 and float32. The weights are random, and the optimizer is AdamW. Each case has
a separate process, and every round times all cases in turn. Prints:
- the median seconds of each case;
- the time that one batch takes in all of --epochs epochs: uncached, with a cache that is filled in
  the first epoch, and with a cache that an earlier run has filled;
- the ratio of the floating-point operations of the uncached to those of the cached step, as counted
  by the compiler.

If open_clip is not installed (make test-peers installs it), or lacks the pair of towers, only ours
runs. With --count, prints the operations of all pairs of towers, and times nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from peers import open_clip
from side_by_side import (
    Run,
    build_parser,
    format_table,
    medians,
    time_in_processes,
    write_results,
)

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
VOCABULARY = 49408  # number of tokens
TEXT_DEPTH = {1024: 24}  # text width: number of layers; 12 for other widths


def build_step(variant: str, length: int, dtype: str) -> tuple[models.ImageTextModel, Any, Any]:
    """Return the model with a locked image tower, its Optax transformation, and the jitted step."""
    _, tower, pixels, width, heads, embed_dim = VARIANTS[variant]
    text = dict(width=width, depth=TEXT_DEPTH.get(width, 12), mlp_dim=4 * width, num_heads=heads)
    model = models.build_model(
        dict(
            image=dict(name="vit", variant=tower, pre_norm=True),
            text=dict(name="text_transformer", max_length=length, **text),
            embed_dim=embed_dim,
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


def make_inputs(model: models.ImageTextModel, batch_size: int, length: int, case: str) -> Batch:
    """Return random texts and images; for "cached", features of the locked tower, no images."""
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, VOCABULARY, (batch_size, length)), jnp.int32)
    batch = Batch(jnp.ones(batch_size, bool), text=ids, text_mask=ids >= 0)
    if case == "cached":
        features = rng.normal(size=(batch_size, model.feature_dim("image")))
        return batch.replace(image_features=jnp.asarray(features, jnp.float32))
    shape = (batch_size, model.image_size, model.image_size, 3)
    return batch.replace(image=jnp.asarray(rng.integers(0, 256, shape), jnp.uint8))


def split_params(params: Any, case: str) -> tuple[Any, Any]:
    """Return (trainable, frozen). The cached step has no frozen parameters."""
    trainable = {name: tree for name, tree in params.items() if name != "image"}
    return trainable, {} if case == "cached" else {"image": params["image"]}


def ours(variant: str, batch_size: int, length: int, dtype: str, case: str) -> Run:
    """Build our step for the case "uncached" or "cached", or only the tower ("frozen prefix")."""
    model, tx, step = build_step(variant, length, dtype)
    batch = make_inputs(model, batch_size, length, case)
    trainable, frozen = split_params(model.init(jax.random.key(0)), case)
    if case == "frozen prefix":
        prefix = jax.jit(
            lambda params, batch: model.apply_frozen_prefix(params, tower="image", batch=batch)
        )
        return lambda: prefix(frozen, batch)
    state = [TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable))]

    def run() -> object:
        state[0], metrics = step(state[0], frozen, batch)
        return metrics

    return run


def operations(variant: str, batch_size: int, length: int, case: str) -> float:
    """Return the floating-point operations of a step, as counted by the compiler."""
    model, tx, step = build_step(variant, length, "float32")
    batch = make_inputs(model, batch_size, length, case)
    trainable, frozen = split_params(model.abstract_params(), case)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), trainable, jax.eval_shape(tx.init, trainable)
    )
    return step.lower(state, frozen, batch).cost_analysis()["flops"]


def open_clip_step(variant: str, batch_size: int, length: int, bf16: bool) -> Run:
    """Build a step of open_clip with its image tower locked, as with `--lock-image`."""
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
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
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


def count_table(batch_size: int, length: int) -> str:
    """Return the compiler's count for every pair of towers as a Markdown table."""
    lines = ["| | TFLOP per step, uncached | cached | ratio |", "|---|---|---|---|"]
    for variant in VARIANTS:
        arguments = (variant, batch_size, length)
        uncached, cached = (operations(*arguments, case) / 1e12 for case in ("uncached", "cached"))
        lines.append(f"| {variant} | {uncached:.2f} | {cached:.3f} | {uncached / cached:.1f} |")
    return "\n".join(lines)


def job_seconds(times: dict[str, list[float]], epochs: int) -> dict[str, float]:
    """Return the seconds that one batch takes in all epochs together, for three ways to train."""
    median_of = medians(times)
    filling_step = median_of["frozen prefix"] + median_of["cached"]
    return {
        "uncached": epochs * median_of["uncached"],
        "cached, filled in the first epoch": filling_step + (epochs - 1) * median_of["cached"],
        "cached by an earlier run": epochs * median_of["cached"],
    }


def main() -> None:
    """Time all cases, one after another in every round, and print two tables."""
    parser = build_parser(__doc__)
    parser.add_argument("--variant", choices=VARIANTS, default="B/16")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16, help="tokens per text")
    parser.add_argument("--dtype", choices=TYPES, default="float32")
    parser.add_argument(
        "--open-clip", nargs="+", choices=TYPES, default=TYPES, help="types that it runs in"
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--count", action="store_true", help="only count the operations")
    args = parser.parse_args()
    if args.count:
        counts = count_table(args.batch_size, args.tokens)
        return print(f"\nbatch {args.batch_size}, {args.tokens} tokens\n\n{counts}")
    arguments = (args.variant, args.batch_size, args.tokens)
    cases: dict[str, Any] = {
        case: (ours, (*arguments, args.dtype, case))
        for case in ("cached", "uncached", "frozen prefix")
    }
    if VARIANTS[args.variant][0] is not None:
        for dtype in args.open_clip:
            name = f"open_clip --lock-image, {dtype}"
            cases[name] = (open_clip_step, (*arguments, dtype == "bfloat16"))
    times = time_in_processes(cases, args.rounds).times
    ratio = operations(*arguments, "uncached") / operations(*arguments, "cached")
    jobs = job_seconds(times, args.epochs)
    print(
        f"\n{args.variant}, batch {args.batch_size}, {args.tokens} tokens, ours in {args.dtype}\n"
    )
    print(format_table(times, "cached"))
    print(f"\nOperations of the uncached step, relative to the cached one: {ratio:.1f}")
    print(f"\n| {args.epochs} epochs | s per batch | times less than uncached |\n|---|---|---|")
    for name, seconds in jobs.items():
        print(f"| {name} | {seconds:.1f} | {jobs['uncached'] / seconds:.1f} |")
    settings = dict(
        variant=args.variant, batch_size=args.batch_size, tokens=args.tokens, dtype=args.dtype
    )
    write_results(args.output, **settings, seconds=times, jobs=jobs, operations_ratio=ratio)


if __name__ == "__main__":
    main()
