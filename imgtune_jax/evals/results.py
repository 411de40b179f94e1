"""`results.jsonl`: one evaluation per line, in CLIP_benchmark's JSON schema."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imgtune_jax.errors import UserError
from imgtune_jax.evals.protocol import Evaluator

REQUIRED_KEYS = ("dataset", "model", "pretrained", "task", "metrics", "language")


def make_result(
    *,
    dataset: str,
    model: str,
    pretrained: str,
    task: str,
    metrics: Mapping[str, float],
    language: str = "en",
    **extra: Any,
) -> dict[str, Any]:
    """Return one line of `results.jsonl`: CLIP_benchmark's six keys, then the `extra` keys.

    Raises UserError for a NaN or an infinity, which strict JSON cannot represent.
    """
    not_finite = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if not_finite:
        raise UserError(
            f"metrics of {dataset} are not finite: {not_finite}; omit undefined metrics"
        )
    floats = {name: float(value) for name, value in metrics.items()}
    values = (dataset, model, pretrained, task, floats, language)
    return dict(zip(REQUIRED_KEYS, values, strict=True)) | extra


def evaluator_result(
    name: str,
    evaluator: Evaluator,
    metrics: Mapping[str, float],
    *,
    model: str,
    step: int,
    **extra: Any,
) -> dict[str, Any]:
    """Return the result, at a training step, of the evaluator with the config key `name`."""
    return make_result(
        dataset=name,
        model=model,
        pretrained=f"step {step}",
        task=evaluator.task,
        metrics=metrics,
        language=evaluator.language,
        step=step,
        **extra,
    )


def append_result(path: str | Path, record: Mapping[str, Any]) -> None:
    """Append a result. Raises UserError for a missing key or a number that is not finite."""
    missing = [key for key in REQUIRED_KEYS if key not in record]
    if missing:
        raise UserError(
            f"a result needs {missing}, but has only {sorted(record)}; use `make_result`"
        )
    line = json.dumps(record, allow_nan=False)
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Return all results, oldest first; an empty list if the file does not exist."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text("utf-8").splitlines()
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise UserError(f"{path} has a line that is not JSON ({error}); remove the line") from error
