"""Objectives: `objective(outputs, batch) -> (loss, metrics)`, one loss a file.

A new loss is one file and one line in `OBJECTIVES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh
from jaxtyping import Array, Float

from imgtune_jax.objectives.caption_loss import CaptionLoss
from imgtune_jax.objectives.sigmoid import SigmoidLoss
from imgtune_jax.objectives.softmax import SoftmaxLoss
from imgtune_jax.types import Batch, Metrics, Outputs

Objective = Callable[[Outputs, Batch], tuple[Float[Array, ""], Metrics]]

OBJECTIVES: dict[str, type] = {
    "softmax": SoftmaxLoss,
    "sigmoid": SigmoidLoss,
    "captioning": CaptionLoss,
}


@dataclass(frozen=True)
class WeightedSum:
    """total = Σ weight · loss. Each raw term is reported under its own name."""

    terms: tuple[tuple[float, Objective], ...]

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        """The weighted sum, and all terms' metrics."""
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
    """{"softmax": {"weight": 1.0, **fields}} -> the weighted sum.

    `mesh` is where outputs and batch are laid out by batch; None: on one device. An objective that
    has a field `mesh` gets it. Raises ValueError for an unknown objective or field.
    """
    terms = []
    for name, fields in cfg.items():
        if name not in OBJECTIVES:
            raise ValueError(f"objective {name!r} is unknown; known: {', '.join(OBJECTIVES)}")
        fields = dict(fields)
        weight = float(fields.pop("weight", 1.0))
        has = {f.name for f in dataclasses.fields(OBJECTIVES[name])}
        known = sorted(has - {"mesh"})
        if unknown := sorted(set(fields) - set(known)):
            raise ValueError(
                f"objective {name!r} has no {unknown}; known: weight, {', '.join(known)}"
            )
        if "mesh" in has:
            fields["mesh"] = mesh
        if weight:
            terms.append((weight, OBJECTIVES[name](**fields)))
    if not terms:
        raise ValueError(f"no objective has a weight other than 0: {dict(cfg)}")
    return WeightedSum(tuple(terms))
