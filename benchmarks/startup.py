"""Time to the first step, from the start of the process: ours, and open_clip's.

.venv-peers/bin/python benchmarks/startup.py [--rounds 3] [--output FILE.json]

ViT-B/32 at 224 pixels and CLIP's text tower with 77 tokens, batch 32, float32, AdamW, random
weights and pixels. Ours with its layers unrolled and with them in a scan; with nothing compiled
before, and with the programs that an earlier process left in JAX's persistent cache, as
`train.py` keeps them. Every case runs in a process of its own, one round after another.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import peers
import side_by_side

ARMS = ("ours", "ours, kept programs", "ours, scan", "ours, scan, kept programs", "open_clip")
STAGES = ("import_s", "build_s", "compile_s", "step_s", "process_s")
BATCH, PIXELS, LENGTH, VOCABULARY = 32, 224, 77, 49408
WIDTH, HEADS, DEPTH = 512, 8, 12


class Stages(dict[str, float]):
    """Seconds by stage, each from the end of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.last = time.perf_counter()

    def end(self, name: str) -> None:
        """Close a stage."""
        now = time.perf_counter()
        self[name], self.last = now - self.last, now


def ours(*, scan: bool, kept: Path | None) -> Stages:
    """Import, initialise, compile, step."""
    stages = Stages()
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from imgtune_jax import models, objectives
    from imgtune_jax.training.optim import Optimizer
    from imgtune_jax.training.step import make_train_step
    from imgtune_jax.types import Batch, TrainState

    if kept is not None:
        jax.config.update("jax_compilation_cache_dir", str(kept))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    stages.end("import_s")
    text = dict(width=WIDTH, depth=DEPTH, mlp_dim=4 * WIDTH, num_heads=HEADS, max_length=LENGTH)
    model = models.build_model(
        dict(
            image=dict(name="vit", variant="B/32", pre_norm=True, scan=scan),
            text=dict(name="text_transformer", scan=scan, **text),
            embed_dim=512,
            image_size=PIXELS,
        )
    )
    tx = optax.adamw(1e-4)

    def init(key: jax.Array) -> TrainState:
        params = model.init(key)
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))

    def forward(params: Any, batch: Batch, rng: jax.Array) -> Any:
        return model.apply(params, batch, rng=rng, train=True)

    state = jax.block_until_ready(jax.jit(init)(jax.random.key(0)))
    stages.end("build_s")
    optimizer = Optimizer(tx=tx, schedule=optax.constant_schedule(1e-4))
    objective = objectives.build_objective({"softmax": {}})
    step = make_train_step(forward, objective, optimizer, key=jax.random.key(1))
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.integers(0, 256, (BATCH, PIXELS, PIXELS, 3)), jnp.uint8)
    ids = jnp.asarray(rng.integers(1, VOCABULARY, (BATCH, LENGTH)), jnp.int32)
    batch = Batch(jnp.ones(BATCH, bool), image=image, text=ids, text_mask=ids >= 0)
    program = jax.jit(step, donate_argnums=0).lower(state, {}, batch).compile()
    stages.end("compile_s")
    jax.block_until_ready(program(state, {}, batch))
    stages.end("step_s")
    return stages


def open_clip() -> Stages:
    """Import, build, step; nothing is compiled."""
    stages = Stages()
    library = peers.open_clip()
    import torch

    stages.end("import_s")
    model = library.create_model("ViT-B-32", pretrained=None)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss = library.ClipLoss()
    stages.end("build_s")
    image = torch.randn(BATCH, 3, PIXELS, PIXELS)
    ids = torch.randint(1, VOCABULARY, (BATCH, LENGTH))
    loss(*model(image, ids)[:3]).backward()
    optimizer.step()
    stages["compile_s"] = 0.0
    stages.end("step_s")
    return stages


def main() -> None:
    """Run all arms in turn and print a table."""
    parser = side_by_side.arguments(__doc__, rounds=3)
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--kept", type=Path, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.one == "open_clip":
        return print(json.dumps(open_clip()))
    if o.one:
        return print(json.dumps(ours(scan="scan" in o.one, kept=o.kept)))
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as kept:
        for turn in range(o.rounds + 1):
            for arm, results in found.items():
                if turn == 0 and "kept" not in arm:
                    continue  # the first turn leaves the programs
                cache = ["--kept", kept] if "kept" in arm else []
                result = side_by_side.in_a_new_process(__file__, "--one", arm, *cache)
                if turn:
                    results.append(result)
    print("\n| | import | build | compile | first step | whole process, s |")
    print("|---|---|---|---|---|---|")
    for arm, results in found.items():
        cells = [f"{statistics.median(r[s] for r in results):.1f}" for s in STAGES]
        print(f"| {arm} | {' | '.join(cells)} |")
    side_by_side.write(o.output, batch=BATCH, cases=found)


if __name__ == "__main__":
    main()
