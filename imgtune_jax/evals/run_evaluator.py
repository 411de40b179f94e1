"""One evaluation of a model: its result, or the error of the evaluator."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from imgtune_jax.errors import UserError
from imgtune_jax.evals.protocol import Evaluator, Predictor
from imgtune_jax.evals.results import evaluator_result

log = logging.getLogger("imgtune_jax.evals")


def run_evaluator(
    name: str, evaluator: Evaluator, predictor: Predictor, *, model: str, step: int
) -> dict[str, Any]:
    """Return the result of an evaluator, as a line of `results.jsonl`.

    If the evaluator raises, the error is logged, and the result has no metrics but the key
    `error`. So an evaluator that fails costs neither the model nor the other evaluations.
    """
    try:
        return evaluator_result(name, evaluator, evaluator(predictor), model=model, step=step)
    except Exception as error:
        # A UserError explains itself. Any other exception may be a bug, which its traceback shows.
        log.error(
            "the evaluation %r of %s failed at step %d: %s",
            name,
            model,
            step,
            error,
            exc_info=not isinstance(error, UserError),
        )
        message = f"{type(error).__name__}: {error}"
        return evaluator_result(name, evaluator, {}, model=model, step=step, error=message)


def failed_results(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the results of failed evaluations that were not repeated with success."""

    def key(result: dict[str, Any]) -> tuple[Any, ...]:
        return result["dataset"], result["model"], result["language"], result.get("step")

    succeeded = {key(result) for result in results if "error" not in result}
    failed = {key(result): result for result in results if "error" in result}
    return [result for k, result in failed.items() if k not in succeeded]
