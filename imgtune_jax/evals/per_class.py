"""Precision, recall and F1 of every class, and the names of these metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Int

T = TypeVar("T")
SCORES = ("precision", "recall", "f1", "support")
# `per_class/f1/cat`. Older runs have `f1/cat`. A class name may contain any character.
METRIC_NAME = re.compile(rf"(?:per_class/)?({'|'.join(SCORES)})/(.*)", re.DOTALL)


class PerClassScores(NamedTuple):
    """Precision, recall and F1 of every class, and its number of examples (support).

    A ratio with denominator 0, such as the precision of a class that is never predicted, is 0, as
    in scikit-learn with `zero_division=0`.
    """

    precision: Float[np.ndarray, " c"]
    recall: Float[np.ndarray, " c"]
    f1: Float[np.ndarray, " c"]
    support: Int[np.ndarray, " c"]
    predicted: Int[np.ndarray, " c"]  # number of times the class was predicted


def per_class_scores(
    predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], *, num_classes: int
) -> PerClassScores:
    """Compute the scores of every class from predicted and true labels."""
    support = np.bincount(labels, minlength=num_classes)
    num_predicted = np.bincount(predicted, minlength=num_classes)
    hits = np.bincount(labels[predicted == labels], minlength=num_classes)
    return PerClassScores(
        precision=hits / np.maximum(num_predicted, 1),
        recall=hits / np.maximum(support, 1),
        f1=2 * hits / np.maximum(support + num_predicted, 1),
        support=support,
        predicted=num_predicted,
    )


def per_class_metrics(scores: PerClassScores, names: Sequence[str]) -> dict[str, float]:
    """Return the scores as metrics, such as `per_class/f1/cat`.

    No other metric starts with `per_class/`. If two classes have one name, every name is followed
    by its label, as in `per_class/f1/cat (3)`.
    """
    if len(set(names)) < len(names):
        names = [f"{name} ({label})" for label, name in enumerate(names)]
    return {
        f"per_class/{score}/{name}": float(value)
        for score in SCORES
        for name, value in zip(names, getattr(scores, score), strict=True)
    }


def split_per_class(metrics: Mapping[str, T]) -> tuple[dict[str, T], dict[str, dict[str, T]]]:
    """Split metrics into those of the data set, and those of each class: {class: {score: value}}.

    The order of the classes is that of their labels.
    """
    whole: dict[str, T] = {}
    by_class: dict[str, dict[str, T]] = {}
    for metric, value in metrics.items():
        if match := METRIC_NAME.fullmatch(metric):
            by_class.setdefault(match[2], {})[match[1]] = value
        else:
            whole[metric] = value
    return whole, by_class
