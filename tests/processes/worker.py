"""Train all cases, in one of several processes, or in a single one with as many devices.

python -m tests.processes.worker FOLDER [COORDINATOR PROCESSES PROCESS]
"""

import sys
from pathlib import Path

TINY = {"total.steps": 4, "log_every": 1, "eval_every.steps": 2, "optim.clip_norm": 1.0}
FSDP = {"mesh.data": 1, "mesh.fsdp": 2}
TENSOR = {"mesh.data": 1, "mesh.tensor": 2}
# name -> (the debug config's argument, changes of the config)
CASES = {
    "data": ("", {"mesh.data": 2}),
    "fsdp": ("", FSDP),
    "fsdp, locked and cached": ("", FSDP | {"lock.image": True, "cache.image_views": 1}),
    "tensor": ("", TENSOR),
    "tensor, locked and cached": ("", TENSOR | {"lock.image": True, "cache.image_views": 1}),
    "accumulation and EMA": ("", {"mesh.data": 2, "accumulation": 2, "optim.ema_decay": 0.5}),
    "coca": ("coca", {"mesh.data": 2}),
}


def main(folder, coordinator=None, processes=None, process=None):
    """Train each case in a folder of its name."""
    from imgtune_jax import distributed
    from imgtune_jax.training import loop
    from tests.debug_run import settings

    numbers = (None if n is None else int(n) for n in (processes, process))
    distributed.initialize(coordinator, *numbers, timeout=60)
    for name, (kind, changes) in CASES.items():
        if "cache.image_views" in changes:
            changes = changes | {"cache.path": str(Path(folder, name, "cache"))}
        loop.train(settings(kind, **TINY, **changes), Path(folder, name))


if __name__ == "__main__":
    main(*sys.argv[1:])
