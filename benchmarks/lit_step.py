"""A training step with the image tower locked: uncached, cached, and open_clip's --lock-image.

.venv-peers/bin/python benchmarks/lit_step.py [--variant B/16] [--rounds 5] [--output FILE.json]

One process, one round after another: ours uncached, ours cached, open_clip in bfloat16 and in
float32. Random weights, batch 32, 16 text tokens, AdamW. Prints medians over the rounds in seconds,
and the job that they make: so many epochs, the first of which fills the cache on its way. Without
open_clip installed (make test-peers installs it), ours alone.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from imgtune_jax import models, objectives
from imgtune_jax.train.optim import Optimizer
from imgtune_jax.train.step import make_train_step
from imgtune_jax.types import Batch, TrainState

VARIANTS = {  # image tower, pixels, text width, heads, embedding: open_clip's own pairs
    "B/32": ("ViT-B-32", 224, 512, 8, 512),
    "B/16": ("ViT-B-16", 224, 512, 8, 512),
    "L/14": ("ViT-L-14", 224, 768, 12, 768),
    "L/14-336": ("ViT-L-14-336", 336, 768, 12, 768),
}
LENGTH, VOCABULARY = 16, 49408


def ours(variant: str, batch_size: int, dtype: str) -> dict[str, Callable[[], None]]:
    """{"front": the locked tower alone, "uncached": a step, "cached": a step}, compiled."""
    _, pixels, width, heads, embed = VARIANTS[variant]
    text = dict(width=width, depth=12, mlp_dim=4 * width, num_heads=heads, max_length=LENGTH)
    model = models.build(
        dict(
            image=dict(name="vit", variant=variant.partition("-")[0], pre_norm=True),
            text=dict(name="text_transformer", **text),
            embed_dim=embed,
            image_size=pixels,
            dtype=dtype,
        )
    )

    def is_frozen(path: str) -> bool:
        return path.startswith("image/")

    model = model.freeze(is_frozen)
    params = model.init(jax.random.key(0))
    tx = optax.adamw(1e-4)
    optimizer = Optimizer(tx=tx, schedule=optax.constant_schedule(1e-4))
    objective = objectives.build({"softmax": dict(weight=1.0)})

    def forward(params: Any, batch: Batch, rng: jax.Array) -> Any:
        return model.apply(params, batch, rng=rng, train=True)

    step = jax.jit(
        make_train_step(forward, objective, optimizer, key=jax.random.key(1)), donate_argnums=0
    )
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (batch_size, pixels, pixels, 3), np.uint8)
    ids = jnp.asarray(rng.integers(0, VOCABULARY, (batch_size, LENGTH)), jnp.int32)
    whole = Batch(jnp.ones(batch_size, bool), text=ids, text_mask=ids >= 0, image=image)
    front = jax.jit(lambda p, b: model.front(p, tower="image", batch=b))
    frozen = {"image": params["image"]}
    features = np.asarray(front(frozen, whole))
    cached = whole.replace(image=None, image_features=features)

    def runner(batch: Batch, frozen: Any) -> Callable[[], None]:
        trained = jax.tree.map(jnp.copy, {k: v for k, v in params.items() if k != "image"})
        state = [TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained))]

        def run() -> None:
            state[0], metrics = step(state[0], frozen, batch)
            jax.block_until_ready(metrics)

        return run

    return {
        "front": lambda: jax.block_until_ready(front(frozen, whole)),
        "uncached": runner(whole, frozen),
        "cached": runner(cached, {}),
    }


def open_clip_step(variant: str, batch_size: int, bf16: bool) -> Callable[[], None]:
    """One step of open_clip with its image tower locked, as `--lock-image` does it."""
    import torch

    # torchvision's CUDA build lacks these on a CPU torch, and fails at import without them.
    for op in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, op):
            signature = "(Tensor dets, Tensor scores, float t) -> Tensor"
            torch.library.define(f"torchvision::{op}", signature)
    import open_clip

    name, pixels, *_ = VARIANTS[variant]
    config = open_clip.get_model_config(name)
    config["text_cfg"]["context_length"] = LENGTH
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    model.lock_image_tower()
    model.train()
    loss = open_clip.ClipLoss()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    image = torch.randn(batch_size, 3, pixels, pixels)
    ids = torch.randint(1, VOCABULARY, (batch_size, LENGTH))

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            image_emb, text_emb, scale = model(image, ids)[:3]
            value = loss(image_emb, text_emb, scale)
        value.backward()
        optimizer.step()

    return run


def main() -> None:
    """Time all arms, interleaved, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=VARIANTS, default="B/16")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", type=Path)
    o = parser.parse_args()
    arms = ours(o.variant, o.batch_size, o.dtype)
    try:
        arms["open_clip bfloat16"] = open_clip_step(o.variant, o.batch_size, bf16=True)
        arms["open_clip float32"] = open_clip_step(o.variant, o.batch_size, bf16=False)
    except ImportError:
        print("open_clip is not installed here; ours alone")
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(o.rounds + 1):
        for name, run in arms.items():
            began = time.perf_counter()
            run()
            if turn:  # the first round compiles
                times[name].append(time.perf_counter() - began)
    m = {name: statistics.median(values) for name, values in times.items()}
    first = m["front"] + m["cached"]  # a step that fills the cache
    jobs = {
        "uncached": o.epochs * m["uncached"],
        "cached, filled on the way": first + (o.epochs - 1) * m["cached"],
        "cached, by another run": o.epochs * m["cached"],
    }
    print(f"\n{o.variant}, batch {o.batch_size}, {LENGTH} tokens, ours in {o.dtype}\n")
    print("| a step | median s | cached step is so many times faster |\n|---|---|---|")
    for name, seconds in m.items():
        print(f"| {name} | {seconds:.2f} | {seconds / m['cached']:.1f} |")
    print(f"\n| {o.epochs} epochs | s a batch | times faster than uncached |\n|---|---|---|")
    for name, seconds in jobs.items():
        print(f"| {name} | {seconds:.1f} | {jobs['uncached'] / seconds:.1f} |")
    if o.output:
        result = {"variant": o.variant, "dtype": o.dtype, "seconds": times, "jobs": jobs}
        o.output.write_text(json.dumps(result | {"machine": platform.processor()}, indent=1))


if __name__ == "__main__":
    main()
