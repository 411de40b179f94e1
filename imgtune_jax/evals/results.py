"""`results.jsonl`: one evaluation per line, in CLIP_benchmark's JSON schema."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from imgtune_jax.errors import UserError
from imgtune_jax.evals.protocol import Evaluator
from imgtune_jax.json_lines import read_json_lines

log = logging.getLogger("imgtune_jax.evals")

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

    A metric that is NaN or infinite is None (null), since JSON has neither, and the log names it.
    """
    not_finite = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if not_finite:
        log.warning("metrics of %s are not finite: %s", dataset, not_finite)
    values = {k: None if k in not_finite else float(v) for k, v in metrics.items()}
    fields = (dataset, model, pretrained, task, values, language)
    return dict(zip(REQUIRED_KEYS, fields, strict=True)) | extra


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
    try:
        line = json.dumps(record, allow_nan=False)
    except ValueError as error:
        raise UserError(
            f"the result of {record['dataset']} has a NaN or an infinity, which JSON does not "
            "have; expected finite numbers or None; use `make_result`"
        ) from error
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Return all results, oldest first; an empty list if the file does not exist."""
    return read_json_lines(path)


def newest_results(results: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the result of the highest step for each task, data set, language and model.

    Of several results at that step, the last one is returned. A result without a step, such as one
    that CLIP_benchmark wrote, is older than those with a step.
    """
    newest: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for result in results:
        key = tuple(result[name] for name in ("task", "dataset", "language", "model"))
        if key not in newest or _step(result) >= _step(newest[key]):
            newest[key] = result
    return list(newest.values())


def _step(result: Mapping[str, Any]) -> int:
    return result.get("step", -1)
