"""Files in a run's folder: names, reading and writing config.json, truncating logs on resume."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import jax

from imgtune_jax import paths
from imgtune_jax.config import Config, differences, load_config, parse_config, save_config
from imgtune_jax.errors import UserError

log = logging.getLogger("imgtune_jax.training")

CONFIG = "config.json"
METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
RESULTS = "results.jsonl"
STORE_PATHS = "cache.json"  # {tower: folder of its feature store}
TOKENIZER = "tokenizer"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
FROZEN = "frozen"

# A resumed run may change keys that start with one of these, since the learned parameters do not
# depend on them.
MUTABLE_KEYS = (
    "baselines",
    "cache.path",
    "checkpoint.",
    "data.num_threads",
    "data.num_workers",
    "data.prefetch",
    "eval_every.",
    "evals",
    "log_every",
    "mesh.",
)


def check_writable(workdir: Path) -> None:
    """Raise UserError if `workdir` is neither a writable folder nor one that can be created."""
    nearest = next(p for p in (workdir, *workdir.parents) if os.path.lexists(p))
    if not nearest.is_dir():
        raise UserError(
            f"workdir = {workdir}, but {nearest} is not a folder; choose another folder"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(
            f"workdir = {workdir}, but {nearest} is not writable; choose another folder"
        )


def recorded_config(config: Config) -> Config:
    """Return the config as a run records it: with absolute paths, valid in every folder."""
    return parse_config(paths.absolute_config(config.to_dict()))


def check_same_config(config: Config, workdir: Path) -> None:
    """Raise UserError if `workdir` holds a run whose config differs in more than MUTABLE_KEYS.

    Relative paths, which older runs recorded, are relative to the current folder.
    """
    path = workdir / CONFIG
    if not path.exists():
        return
    saved = recorded_config(load_config(path))
    changed = {
        key: values
        for key, values in differences(saved, recorded_config(config)).items()
        if not key.startswith(MUTABLE_KEYS)
    }
    if changed:
        lines = [
            f"{key}: {old!r} in the saved run, {new!r} now" for key, (old, new) in changed.items()
        ]
        raise UserError(
            f"{workdir} holds a run with another config; resuming it needs equal settings. "
            f"Set these back, or choose a new --workdir:\n  " + "\n  ".join(lines)
        )


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
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            log.warning("%s: dropped an incomplete line: %.60s", path.name, line)
            break
        if record.get("step", 0) <= last_step:
            lines.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in lines))
    temporary.replace(path)
