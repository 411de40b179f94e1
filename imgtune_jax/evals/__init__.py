"""Evaluators: frozen dataclasses that compute metrics, `evaluator(predictor) -> {metric: value}`.

To add an evaluator, add a file and a line in `EVALUATORS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from imgtune_jax import data, objectives
from imgtune_jax.errors import UserError
from imgtune_jax.evals.captioning import Captioning
from imgtune_jax.evals.fewshot import FewShot
from imgtune_jax.evals.linear_probe import LinearProbe
from imgtune_jax.evals.metric_direction import is_fraction, metric_sign
from imgtune_jax.evals.per_class import split_per_class
from imgtune_jax.evals.predictor import ModelPredictor
from imgtune_jax.evals.protocol import Evaluator, GeneratedCaption, Predictor
from imgtune_jax.evals.results import (
    append_result,
    evaluator_result,
    make_result,
    newest_results,
    read_results,
)
from imgtune_jax.evals.retrieval import Retrieval, curve_names
from imgtune_jax.evals.ridge import ridge_baseline
from imgtune_jax.evals.ridge_retrieval import RidgeRetrieval
from imgtune_jax.evals.run_evaluator import failed_results, run_evaluator
from imgtune_jax.evals.scoring_classifier import ScoringClassifier
from imgtune_jax.evals.validation_loss import ValidationLoss
from imgtune_jax.evals.zeroshot import ZeroShot

__all__ = [
    "EVALUATORS",
    "Evaluator",
    "GeneratedCaption",
    "ModelPredictor",
    "Predictor",
    "append_result",
    "build_evaluators",
    "curve_names",
    "evaluator_result",
    "failed_results",
    "is_fraction",
    "make_result",
    "metric_sign",
    "newest_results",
    "read_results",
    "ridge_baseline",
    "run_evaluator",
    "split_per_class",
]

EVALUATORS: dict[str, type] = {
    "retrieval": Retrieval,
    "zeroshot": ZeroShot,
    "linear_probe": LinearProbe,
    "fewshot": FewShot,
    "loss": ValidationLoss,
    "ridge_retrieval": RidgeRetrieval,
    "captioning": Captioning,
    "scoring_classifier": ScoringClassifier,
}


def build_evaluators(
    cfg: Mapping[str, Mapping[str, Any]], *, mesh: Mesh | None = None
) -> dict[str, Evaluator]:
    """Build {"coco": Retrieval(...)} from {"coco": {"name": "retrieval", "source": {...}, …}}.

    Keys other than `name` are fields of the evaluator. `data.build_source` builds fields whose
    names end in `source`. `objectives.build_objective` builds the field `objective` of a validation
    loss, which has the format of `config.objectives`. An evaluator that has a field `mesh` gets
    `mesh` and splits its work over the devices. Raises UserError that lists all unknown names and
    all unknown and missing fields.
    """
    errors = [error for key, fields in cfg.items() for error in _field_errors(key, fields)]
    if errors:
        raise UserError("config.evals is not valid:\n  " + "\n  ".join(errors))
    built = {}
    for key, fields in cfg.items():
        try:
            built[key] = _build_evaluator(fields, mesh)
        except UserError as error:
            errors.append(f"{key}: {error}")
    if errors:
        raise UserError("config.evals is not valid:\n  " + "\n  ".join(errors))
    return built


def _build_evaluator(fields: Mapping[str, Any], mesh: Mesh | None) -> Evaluator:
    evaluator_class = EVALUATORS[fields["name"]]
    built = {name: _build_field(name, value) for name, value in fields.items() if name != "name"}
    if "mesh" in _dataclass_fields(evaluator_class):
        built["mesh"] = mesh
    return evaluator_class(**built)


def _build_field(name: str, value: Any) -> Any:
    if name.endswith("source") and isinstance(value, Mapping):
        return data.build_source(value)
    if name == "objective" and isinstance(value, Mapping):
        return objectives.build_objective(value)
    return tuple(value) if isinstance(value, list) else value


def _dataclass_fields(evaluator_class: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(evaluator_class)}


def _field_errors(key: str, fields: Mapping[str, Any]) -> list[str]:
    name = fields.get("name")
    if name not in EVALUATORS:
        return [f"{key}.name = {name!r} is unknown; known: {', '.join(EVALUATORS)}"]
    known = _dataclass_fields(EVALUATORS[name])
    configured = set(fields) - {"name"}
    required = {
        field.name
        for field in known.values()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    settable = sorted(set(known) - {"mesh"})
    unknown = [
        f"{key}.{field} is unknown; known: {', '.join(settable)}"
        for field in configured - set(settable)
    ]
    return sorted(unknown) + [
        f"{key}.{field} is missing" for field in sorted(required - configured)
    ]
