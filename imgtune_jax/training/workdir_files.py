"""Files in a run's folder: names, config.json, and what a run that was interrupted left."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from imgtune_jax import paths
from imgtune_jax.config import Config, differences, load_config, parse_config, save_config
from imgtune_jax.errors import ExistingFileError, UserError

log = logging.getLogger("imgtune_jax.training")

CONFIG = "config.json"
METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
RESULTS = "results.jsonl"
REPORT = "report.html"
STORE_PATHS = "cache.json"  # {tower: folder of its feature store}
TOKENIZER = "tokenizer"
TENSORBOARD = "tensorboard"
WANDB_RUN = "wandb_run.txt"  # the id of the run in W&B
CHECKPOINTS = "checkpoints"
FROZEN = "frozen"
SAVED_PARAMS = "params.safetensors"  # in the folder of a saved model, which is no run

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
    """Raise UserError if `workdir` holds a run whose config differs in keys that may not change.

    Relative paths, which older runs recorded, are relative to the current folder.
    """
    path = workdir / CONFIG
    if not path.exists():
        return
    saved = recorded_config(load_config(path))
    changed = {
        key: values
        for key, values in differences(saved, recorded_config(config)).items()
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


def check_no_saved_model(workdir: Path) -> None:
    """Raise ExistingFileError if `workdir` holds a saved model, which a run would overwrite."""
    if (workdir / SAVED_PARAMS).exists():
        raise ExistingFileError(
            f"{workdir} holds a saved model ({SAVED_PARAMS}); expected a new folder or that of a "
            f"run; choose another --workdir"
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
    if jax.process_index() != 0:
        return
    path = workdir / STORE_PATHS
    if store_paths:
        _replace_text(path, json.dumps(store_paths, indent=1) + "\n")
    else:
        path.unlink(missing_ok=True)


def delete_unsaved_run(workdir: Path) -> None:
    """Delete what a run wrote that stopped before its first checkpoint, on the first host.

    Its config may have been another one. Without config.json, no run began in this folder, and
    nothing but logs is deleted.
    """
    if jax.process_index() != 0:
        return
    names = [METRICS, TIMING, RESULTS]
    if (workdir / CONFIG).exists():
        names += [REPORT, STORE_PATHS, TOKENIZER, TENSORBOARD, WANDB_RUN]
    for path in (workdir / name for name in names):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def delete_temporary_files(workdir: Path) -> None:
    """Delete the temporary files and folders of a process that was killed, on the first host.

    Orbax deletes those in `checkpoints`.
    """
    if jax.process_index() == 0:
        for path in workdir.glob("*.tmp"):
            path.unlink(missing_ok=True)
        for path in (workdir / FROZEN).glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)


def has_evaluation(workdir: Path, step: int, names: Mapping[str, Any]) -> bool:
    """Whether the logs have a complete evaluation of a step by the evaluators `names`.

    An evaluation is complete if no evaluator failed and its metrics are logged, which comes last.
    """
    results = [r for _, r in _read_lines(workdir / RESULTS) if r.get("step") == step]
    succeeded = {result["dataset"] for result in results if "error" not in result}
    logged = (r for _, r in _read_lines(workdir / METRICS) if r.get("step") == step)
    return names.keys() <= succeeded and any(_is_evaluation(record) for record in logged)


def read_metric(workdir: Path, name: str) -> dict[int, float]:
    """Return the logged values of a metric by step."""
    records = (record for _, record in _read_lines(workdir / METRICS))
    return {record["step"]: record[name] for record in records if name in record}


def truncate_logs(workdir: Path, last_step: int, *, keep_evaluation: bool = True) -> None:
    """Truncate the logs to the records up to `last_step`, on the first host.

    With `keep_evaluation=False`, the evaluation of `last_step` is dropped too.
    """

    def is_kept(record: Mapping[str, Any]) -> bool:
        step = record.get("step", 0)
        return step < last_step or (
            step == last_step and (keep_evaluation or not _is_evaluation(record))
        )

    if jax.process_index() == 0:
        for path in (workdir / name for name in (METRICS, TIMING, RESULTS)):
            if path.exists():
                lines = [line for line, record in _read_lines(path) if is_kept(record)]
                _replace_text(path, "".join(f"{line}\n" for line in lines))


def _is_evaluation(record: Mapping[str, Any]) -> bool:
    """Whether a record of a log has the metrics of an evaluation, not of a training step."""
    return not any(name.startswith("train/") for name in record)


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines of a log, as text and as records, up to one that a kill left incomplete."""
    if not path.exists():
        return
    for line in path.read_text("utf-8").split("\n"):
        if not line:
            continue
        try:
            yield line, json.loads(line)
        except json.JSONDecodeError:
            log.warning("%s: dropped an incomplete line: %.60s", path.name, line)
            return


def _replace_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)
