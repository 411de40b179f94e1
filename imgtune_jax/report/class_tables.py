"""Tables of the classes that a run classifies best and worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imgtune_jax.evals.per_class import split_per_class
from imgtune_jax.evals.results import newest_results

MAX_CLASSES = 20  # of a table; with more, the best and the worst 10 are shown


@dataclass(frozen=True)
class ClassRow:
    """One class: F1, precision and recall in percent, and its number of images."""

    name: str
    f1: str
    precision: str
    recall: str
    images: str


@dataclass(frozen=True)
class ClassTable:
    """The classes of one data set by decreasing F1; classes without images are left out.

    `best` has all `num_classes` classes if `worst` is empty.
    """

    dataset: str
    model: str
    pretrained: str
    num_classes: int
    best: list[ClassRow]
    worst: list[ClassRow]


def class_tables(results: Sequence[Mapping[str, Any]]) -> list[ClassTable]:
    """Return one table for each newest result that has metrics per class."""
    tables = []
    for result in newest_results(results):
        _, by_class = split_per_class(result["metrics"])
        present = {name: scores for name, scores in by_class.items() if scores.get("support")}
        names = sorted(present, key=lambda name: -present[name].get("f1", 0.0))
        rows = [_class_row(name, present[name]) for name in names]
        if rows:
            half = MAX_CLASSES // 2 if len(rows) > MAX_CLASSES else len(rows)
            fields = result["dataset"], result["model"], result["pretrained"], len(rows)
            best, worst = rows[:half], rows[half:][-half:]
            tables.append(ClassTable(*fields, best=best, worst=worst))
    return tables


def _class_row(name: str, scores: Mapping[str, float]) -> ClassRow:
    def percent(score: str) -> str:
        return f"{100 * scores[score]:.1f}" if score in scores else "–"

    return ClassRow(
        name, percent("f1"), percent("precision"), percent("recall"), f"{scores['support']:,.0f}"
    )
