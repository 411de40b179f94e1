"""Files in a run's folder: names, reading and writing config.json, truncating logs on resume."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from imgtune_jax.config import Config, differences, load_config, save_config
from imgtune_jax.errors import UserError

log = logging.getLogger("imgtune_jax.training")

CONFIG = "config.json"
METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
RESULTS = "results.jsonl"
STORE_PATHS = "cache.json"  # {tower: folder of its feature store}
TOKENIZER = "tokenizer"
TENSORBOARD = "tensorboard"
WANDB_RUN = "wandb_run.txt"  # the id of the run in W&B
CHECKPOINTS = "checkpoints"
FROZEN = "frozen"

# A resumed run may change keys that start with one of these, since the learned parameters do not
# depend on them.
MUTABLE_KEYS = (
    "baselines",
    "checkpoint.",
    "data.num_threads",
    "data.num_workers",
    "data.prefetch",
    "eval_every.",
    "evals",
    "log_every",
    "mesh.",
    "wandb_project",
)


def check_same_config(config: Config, workdir: Path) -> None:
    """Raise UserError if `workdir` holds a run whose config differs in keys that may not change."""
    path = workdir / CONFIG
    if not path.exists():
        return
    changed = {
        key: values
        for key, values in differences(load_config(path), config).items()
        if not _is_mutable(key, *values)
    }
    if changed:
        lines = [
            f"{key}: {old!r} in the saved run, {new!r} now" for key, (old, new) in changed.items()
        ]
        raise UserError(
            f"{workdir} holds a run with another config; resuming it needs equal settings. "
            f"Set these back, or choose a new --workdir:\n  " + "\n  ".join(lines)
        )


def _is_mutable(key: str, old: Any, new: Any) -> bool:
    """Return whether a resumed run may change a config value from `old` to `new`."""
    if key == "cache.path":
        # A run without a cache has a new augmentation in every epoch, and features are not rounded.
        return old is not None and new is not None
    return key.startswith(MUTABLE_KEYS)


def write_config(config: Config, workdir: Path) -> None:
    """Create `workdir` and save the config in it, atomically, on the first host."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = workdir / f"{CONFIG}.tmp"
        save_config(config, temporary)
        temporary.replace(workdir / CONFIG)


def write_store_paths(store_paths: Mapping[str, str], workdir: Path) -> None:
    """Save the folders of the feature stores by tower, if there are any, on the first host."""
    if store_paths and jax.process_index() == 0:
        (workdir / STORE_PATHS).write_text(json.dumps(store_paths, indent=1) + "\n")


def truncate_logs(workdir: Path, last_step: int) -> None:
    """Truncate the logs to the records up to `last_step`, on the first host."""
    if jax.process_index() == 0:
        for name in (METRICS, TIMING, RESULTS):
            _truncate_jsonl(workdir / name, last_step)


def _truncate_jsonl(path: Path, last_step: int) -> None:
    """Drop records after `last_step` and an incomplete last line; a resumed run rewrites them."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text("utf-8").split("\n"):
        if not line:
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            log.warning("%s: dropped an incomplete line: %.60s", path.name, line)
            break
        if record.get("step", 0) <= last_step:
            lines.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    temporary.replace(path)
