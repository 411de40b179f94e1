"""Logs of a run: progress bar, metrics.jsonl, timing.jsonl, TensorBoard and W&B.

`metrics.jsonl` holds only values that are a function of config and data, so two runs of one config
write the same bytes. Wall-clock times are in `timing.jsonl`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorboardX
from tqdm import tqdm

from imgtune_jax.training import workdir_files

try:
    import wandb  # pyright: ignore[reportMissingImports]
except ImportError:
    wandb = None


class MetricLogger:
    """Logs the metrics of one run, on the first host only.

    `active` is False on the other hosts, where the methods do nothing.
    W&B is used if it is installed; WANDB_MODE=disabled turns it off.
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
        self._active = active
        self._batch_size = batch_size
        self._wait_seconds = 0.0  # since the last `log_train`
        self._last_time, self._last_step = time.perf_counter(), start  # of the last `log_train`
        if not active:
            return
        self._metrics = (workdir / workdir_files.METRICS).open("a", encoding="utf8")
        self._timing = (workdir / workdir_files.TIMING).open("a", encoding="utf8")
        self._tensorboard = tensorboardX.SummaryWriter(
            str(workdir / workdir_files.TENSORBOARD), purge_step=start
        )
        self._progress_bar = tqdm(
            total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05
        )
        self._wandb = None
        if wandb is not None:
            self._wandb = wandb.init(
                project="imgtune_jax", dir=str(workdir), config=dict(config), resume="allow"
            )

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
            for log in (self._metrics, self._timing, self._tensorboard, self._progress_bar):
                log.close()
            if self._wandb is not None:
                self._wandb.finish()

    def _write(self, file: Any, step: int, values: Mapping[str, float]) -> None:
        """Append the finite values to a JSONL file; send all values to TensorBoard and W&B."""
        record = {"step": step} | {k: v for k, v in values.items() if math.isfinite(v)}
        file.write(json.dumps(record) + "\n")
        file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name.replace("@", "_at_"), value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)
