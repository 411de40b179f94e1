"""Objectives, one per file: `objective(outputs, batch) -> (loss, metrics)`.

Each loss is also available as a function of arrays: `softmax_loss`, `sigmoid_loss` and
`token_cross_entropy`. To add an objective, add a file and a line in `OBJECTIVES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh
from jaxtyping import Array, Float

from imgtune_jax.errors import UserError
from imgtune_jax.objectives.caption_loss import CaptionLoss, token_cross_entropy
from imgtune_jax.objectives.sigmoid import SigmoidLoss, sigmoid_loss
from imgtune_jax.objectives.softmax import SoftmaxLoss, softmax_loss
from imgtune_jax.types import Batch, Metrics, Outputs

__all__ = [
    "OBJECTIVES",
    "CaptionLoss",
    "Objective",
    "SigmoidLoss",
    "SoftmaxLoss",
    "WeightedSum",
    "build_objective",
    "sigmoid_loss",
    "softmax_loss",
    "token_cross_entropy",
]

Objective = Callable[[Outputs, Batch], tuple[Float[Array, ""], Metrics]]

OBJECTIVES: dict[str, type] = {
    "softmax": SoftmaxLoss,
    "sigmoid": SigmoidLoss,
    "captioning": CaptionLoss,
}


@dataclass(frozen=True)
class WeightedSum:
    """The weighted sum of several objectives. The metrics of each objective are unweighted."""

    terms: tuple[tuple[float, Objective], ...]

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        """Return the weighted sum of the losses, and the metrics of all terms."""
        total: Any = 0.0
        metrics: Metrics = {}
        for weight, objective in self.terms:
            loss, term_metrics = objective(outputs, batch)
            total += weight * loss
            metrics |= term_metrics
        return total, metrics


def build_objective(
    cfg: Mapping[str, Mapping[str, Any]], *, mesh: Mesh | None = None
) -> WeightedSum:
    """Build the objective that a config describes: {"softmax": {"weight": 1.0, **fields}, …}.

    `mesh` is the device mesh that shards the rows of the batch and of the outputs, or None for one
    device. It is passed to every objective that has a field `mesh`. The default weight is 1.
    Objectives with weight 0 are left out. Raises UserError for an unknown objective or field, and
    if no objective remains.
    """
    terms = []
    for name, fields in cfg.items():
        if name not in OBJECTIVES:
            raise UserError(f"objective {name!r} is unknown; known: {', '.join(OBJECTIVES)}")
        fields = dict(fields)
        weight = float(fields.pop("weight", 1.0))
        field_names = {f.name for f in dataclasses.fields(OBJECTIVES[name])}
        known = sorted(field_names - {"mesh"})
        if unknown := sorted(set(fields) - set(known)):
            raise UserError(
                f"objective {name!r} has unknown fields {unknown}; known: weight, "
                f"{', '.join(known)}"
            )
        if "mesh" in field_names:
            fields["mesh"] = mesh
        if weight:
            terms.append((weight, OBJECTIVES[name](**fields)))
    if not terms:
        raise UserError(
            f"objectives = {dict(cfg)}; expected a weight other than 0; set the weight of at least "
            "one term"
        )
    return WeightedSum(tuple(terms))
