"""Time to the first step, from the start of the process: ours and open_clip's.

.venv-peers/bin/python benchmarks/startup.py [--rounds 3] [--output FILE.json]
.venv/bin/python benchmarks/startup.py --against CHECKOUT [--rounds 5]

The model is ViT-B/32 at 224 pixels and CLIP's text tower with 77 tokens, with random weights. The
step has batch 32, random pixels, float32 and AdamW. Ours runs with its layers in a loop and in a
scan. Each of these runs without a compilation cache, and with the compiled programs that an earlier
process stored in JAX's persistent cache, which `train.py` uses. Every round runs all variants in
turn, each in a new process. With --against, only ours without a cache is timed, in this checkout
and in another one.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import checkouts
import peers
import side_by_side

VARIANTS = (
    "ours",
    "ours, cached programs",
    "ours, scan",
    "ours, scan, cached programs",
    "open_clip",
)
STAGES = ("import_s", "build_s", "compile_s", "step_s", "process_s")
BATCH_SIZE, PIXELS, LENGTH, VOCABULARY = 32, 224, 77, 49408
WIDTH, HEADS, DEPTH = 512, 8, 12


class Stages(dict[str, float]):
    """Seconds by stage; a stage lasts from the end of the previous one to a call of `end`."""

    def __init__(self) -> None:
        super().__init__()
        self.last_end = time.perf_counter()

    def end(self, name: str) -> None:
        """End the stage `name`: store the seconds since the end of the previous stage."""
        now = time.perf_counter()
        self[name], self.last_end = now - self.last_end, now


def ours(*, scan: bool, cache_dir: Path | None) -> Stages:
    """Import the package, initialize the model, compile a step, and run it."""
    stages = Stages()
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from imgtune_jax import models, objectives
    from imgtune_jax.training.optim import Optimizer
    from imgtune_jax.training.step import make_train_step
    from imgtune_jax.types import Batch, TrainState

    if cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir))
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
    image = jnp.asarray(rng.integers(0, 256, (BATCH_SIZE, PIXELS, PIXELS, 3)), jnp.uint8)
    ids = jnp.asarray(rng.integers(1, VOCABULARY, (BATCH_SIZE, LENGTH)), jnp.int32)
    batch = Batch(jnp.ones(BATCH_SIZE, bool), image=image, text=ids, text_mask=ids >= 0)
    program = jax.jit(step, donate_argnums=0).lower(state, {}, batch).compile()
    stages.end("compile_s")
    jax.block_until_ready(program(state, {}, batch))
    stages.end("step_s")
    return stages


def open_clip() -> Stages:
    """Import open_clip, build the model, and run a step; nothing is compiled."""
    stages = Stages()
    library = peers.open_clip()
    import torch

    stages.end("import_s")
    model = library.create_model("ViT-B-32", pretrained=None)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss = library.ClipLoss()
    stages.end("build_s")
    image = torch.randn(BATCH_SIZE, 3, PIXELS, PIXELS)
    ids = torch.randint(1, VOCABULARY, (BATCH_SIZE, LENGTH))
    loss(*model(image, ids)[:3]).backward()
    optimizer.step()
    stages["compile_s"] = 0.0
    stages.end("step_s")
    return stages


def run_all(rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Run all variants, one after another in every round; return the stages of each round."""
    results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as cache_dir:
        for round_index in range(rounds + 1):
            for variant in VARIANTS:
                uses_cache = "cached" in variant
                if round_index == 0 and not uses_cache:
                    continue  # the first round only fills the cache
                cache = ["--cache-dir", cache_dir] if uses_cache else []
                stages = side_by_side.run_script(__file__, "--one", variant, *cache)
                if round_index:
                    results[variant].append(stages)
    return results


def main() -> None:
    """Run all variants, one after another in every round, and print a table."""
    parser = side_by_side.build_parser(__doc__, rounds=3)
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--cache-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one == "open_clip":
        return print(json.dumps(open_clip()))
    if args.one:
        return print(json.dumps(ours(scan="scan" in args.one, cache_dir=args.cache_dir)))
    if args.against:
        seconds = {
            variant: checkouts.compare_scripts(
                "startup.py", ("--one", variant), args.against, args.rounds
            )
            for variant in ("ours", "ours, scan")
        }
        print(f"\n{checkouts.format_comparison(seconds)}")
        return side_by_side.write_results(args.output, batch=BATCH_SIZE, seconds=seconds)
    results = run_all(args.rounds)
    print("\n| seconds | import | build | compile | first step | full process |")
    print("|---|---|---|---|---|---|")
    for variant, stages in results.items():
        cells = [f"{statistics.median(s[name] for s in stages):.1f}" for name in STAGES]
        print(f"| {variant} | {' | '.join(cells)} |")
    side_by_side.write_results(args.output, batch=BATCH_SIZE, cases=results)


if __name__ == "__main__":
    main()
