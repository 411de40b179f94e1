"""The config, metrics and results of a run, read from its workdir."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgtune_jax.config import flatten_config
from imgtune_jax.errors import MissingFileError
from imgtune_jax.evals import failed_results, read_results
from imgtune_jax.json_lines import read_json_lines

Series = list[tuple[int, float]]  # (step, value)


@dataclass(frozen=True)
class RunData:
    """The files of a run's workdir; a field is empty if its file does not exist."""

    name: str
    config: dict[str, Any]  # by dotted key
    series: dict[str, Series]  # by metric name
    results: list[dict[str, Any]]
    failures: list[dict[str, Any]]  # results of evaluations that failed, with the key `error`

    @property
    def last_step(self) -> int | None:
        """The last step that has a metric; None if there are no metrics."""
        return max((points[-1][0] for points in self.series.values()), default=None)


def read_run_data(workdir: Path) -> RunData:
    """Read config.json, metrics.jsonl, timing.jsonl and results.jsonl of `workdir`.

    Raises MissingFileError if the folder does not exist, UserError for a line that is not JSON.
    """
    if not workdir.is_dir():
        raise MissingFileError(
            f"workdir = {workdir} does not exist; expected the --workdir of a training run"
        )
    path = workdir / "config.json"
    config = json.loads(path.read_text("utf-8")) if path.exists() else {}
    lines = read_json_lines(workdir / "metrics.jsonl") + read_json_lines(workdir / "timing.jsonl")
    results = read_results(workdir / "results.jsonl")
    return RunData(
        name=str(config.get("name", workdir.resolve().name)),
        config=flatten_config(config) if config else {},
        series=_series_by_metric(lines),
        results=[result for result in results if "error" not in result],
        failures=failed_results(results),
    )


def _series_by_metric(lines: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Return the finite values of each metric by step."""
    by_name: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and value is not None and math.isfinite(value):
                by_name.setdefault(name, {})[int(line["step"])] = float(value)
    return {name: sorted(points.items()) for name, points in by_name.items()}
