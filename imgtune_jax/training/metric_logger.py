"""Logs of a run: progress bar, metrics.jsonl, timing.jsonl, TensorBoard and W&B.

`metrics.jsonl` holds only values that are a function of config and data, so two runs of one config
write the same bytes. Wall-clock times are in `timing.jsonl`.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from imgtune_jax.disk_space import explain_full_disk
from imgtune_jax.errors import DiskFullError, UserError
from imgtune_jax.training import workdir_files
from imgtune_jax.training.tensorboard_log import TensorboardLog


def import_wandb() -> Any:
    """Return the module of W&B. Raises UserError if it is not installed.

    A folder called wandb in the current folder, such as W&B itself creates, can be imported as an
    empty package.
    """
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        wandb = None
    if not hasattr(wandb, "init"):
        raise UserError(
            "config.wandb_project is set, but W&B is not installed; run pip install "
            "'imgtune_jax[wandb]', or set config.wandb_project to None"
        )
    return wandb


class MetricLogger:
    """Logs the metrics of one run, on the first host only.

    `active` is False on the other hosts, where the methods do nothing.
    W&B is used if config.wandb_project is set.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        start: int,
        total: int,
        batch_size: int,
        active: bool = True,
        config: Mapping[str, Any],
    ) -> None:
        self._active, self._workdir = active, workdir
        self._batch_size = batch_size
        self._wait_seconds = 0.0  # since the last `log_train`
        self._last_time, self._last_step = time.perf_counter(), start  # of the last `log_train`
        if not active:
            return
        # Without a buffer, an error occurs at the line that causes it, and not again at the end.
        self._metrics = (workdir / workdir_files.METRICS).open("ab", buffering=0)
        self._timing = (workdir / workdir_files.TIMING).open("ab", buffering=0)
        self._tensorboard = TensorboardLog(workdir / workdir_files.TENSORBOARD, start=start)
        self._progress_bar = tqdm(
            total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05
        )
        self._wandb = _open_wandb_run(workdir, config)

    def add_wait_time(self, seconds: float) -> None:
        """Add time that the loop spent waiting for data."""
        self._wait_seconds += seconds

    def update_progress(self, step: int) -> None:
        """Advance the progress bar to `step`."""
        if self._active:
            self._progress_bar.update(step - self._progress_bar.n)

    def log_train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of one step under `train/`, and the speed since the last call."""
        if not self._active:
            return
        now = time.perf_counter()
        seconds, num_steps = now - self._last_time, step - self._last_step
        wait_share = min(self._wait_seconds / seconds, 1.0) if seconds else 0.0
        speed = num_steps * self._batch_size / seconds if seconds else 0.0
        self._write(self._metrics, step, {f"train/{k}": v for k, v in metrics.items()})
        timing = {
            "train/samples_per_second": speed,
            "train/data_time": self._wait_seconds / max(num_steps, 1),
            "train/data_wait_share": wait_share,
        }
        self._write(self._timing, step, timing)
        self._progress_bar.set_postfix_str(
            f"loss {metrics['loss']:.3f}, {speed:.0f} img/s, data wait {wait_share:.0%}"
        )
        self._last_time, self._last_step, self._wait_seconds = now, step, 0.0

    def log_eval(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        """Log the metrics of an evaluation, and exclude its `seconds` from the training speed."""
        self._last_time += seconds
        if self._active:
            self._write(self._metrics, step, metrics)

    def close(self) -> None:
        """Flush and close all logs."""
        if self._active:
            if self._wandb is not None:
                self._wandb.finish()
            for log in (self._progress_bar, self._tensorboard, self._metrics, self._timing):
                log.close()

    def _write(self, file: io.FileIO, step: int, values: Mapping[str, float]) -> None:
        """Append the finite values to a JSONL file; send all values to TensorBoard and W&B."""
        record = {"step": step} | {k: v for k, v in values.items() if math.isfinite(v)}
        _append(file, json.dumps(record) + "\n")
        with explain_full_disk(self._workdir, "a TensorBoard file"):
            self._tensorboard.add_scalars(step, values)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)


def _append(file: io.FileIO, line: str) -> None:
    """Append a line. If the disk is full, leave no part of it, and raise DiskFullError."""
    remaining, size = line.encode(), file.seek(0, os.SEEK_END)
    try:
        with explain_full_disk(Path(str(file.name)), "a line", wanted=len(remaining)):
            while remaining:
                remaining = remaining[file.write(remaining) :]
    except DiskFullError:
        file.truncate(size)
        raise


def _open_wandb_run(workdir: Path, config: Mapping[str, Any]) -> Any:
    """Return the run in W&B, or None if the config has no project.

    All processes of a run continue one run in W&B, whose id is saved in the workdir.
    """
    if config["wandb_project"] is None:
        return None
    path = workdir / workdir_files.WANDB_RUN
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8] + "\n")
    return import_wandb().init(
        project=config["wandb_project"],
        id=path.read_text().strip(),
        resume="allow",
        dir=str(workdir),
        config=dict(config),
    )
