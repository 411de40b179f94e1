"""What a person sees while a run goes on: progress bar, metrics.jsonl, TensorBoard, W&B.

`metrics.jsonl` holds only what is a function of config and data, so two runs can be compared byte
for byte; wall-clock figures go to `timing.jsonl`.
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
    """Writes the metrics of one run; on all hosts but the first it does nothing.

    W&B is used where it is installed; WANDB_MODE=disabled turns it off.
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
        self._waited = 0.0
        self._since, self._since_step = time.perf_counter(), start
        if not active:
            return
        self._metrics = (workdir / workdir_files.METRICS).open("a", encoding="utf8")
        self._timing = (workdir / workdir_files.TIMING).open("a", encoding="utf8")
        self._board = tensorboardX.SummaryWriter(
            str(workdir / workdir_files.TENSORBOARD), purge_step=start
        )
        self._bar = tqdm(
            total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05
        )
        self._wandb = None
        if wandb is not None:
            self._wandb = wandb.init(
                project="imgtune_jax", dir=str(workdir), config=dict(config), resume="allow"
            )

    def add_wait_time(self, seconds: float) -> None:
        """Add time that the loop spent waiting for data."""
        self._waited += seconds

    def update_progress(self, step: int) -> None:
        """Move the bar."""
        if self._active:
            self._bar.update(step - self._bar.n)

    def log_train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one step's metrics under `train/`, and the rate since the last call."""
        if not self._active:
            return
        now = time.perf_counter()
        span, steps = now - self._since, step - self._since_step
        share = min(self._waited / span, 1.0) if span else 0.0
        rate = steps * self._batch_size / span if span else 0.0
        self._write(self._metrics, step, {f"train/{k}": v for k, v in metrics.items()})
        timing = {
            "train/samples_per_second": rate,
            "train/data_time": self._waited / max(steps, 1),
            "train/data_wait_share": share,
        }
        self._write(self._timing, step, timing)
        self._bar.set_postfix_str(
            f"loss {metrics['loss']:.3f}, {rate:.0f} img/s, data wait {share:.0%}"
        )
        self._since, self._since_step, self._waited = now, step, 0.0

    def log_eval(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        """Log an evaluation's metrics; its time does not count as training time."""
        self._since += seconds
        if self._active:
            self._write(self._metrics, step, metrics)

    def close(self) -> None:
        """Flush and close everything."""
        if self._active:
            for sink in (self._metrics, self._timing, self._board, self._bar):
                sink.close()
            if self._wandb is not None:
                self._wandb.finish()

    def _write(self, file: Any, step: int, values: Mapping[str, float]) -> None:
        record = {"step": step} | {k: v for k, v in values.items() if math.isfinite(v)}
        file.write(json.dumps(record) + "\n")
        file.flush()
        for name, value in values.items():
            self._board.add_scalar(name.replace("@", "_at_"), value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)
