from __future__ import annotations

import pytest

from imgtune_jax.evals.results import make_result
from imgtune_jax.report.class_tables import MAX_CLASSES, class_tables


def result(f1, *, prefix="per_class/", support=3.0, **fields):
    """Return a result in which class i has the name `ci` and the F1 f1[i]."""
    metrics = {"acc1": 0.5}
    for i, value in enumerate(f1):
        metrics |= {f"{prefix}f1/c{i}": value, f"{prefix}support/c{i}": support}
    fields = dict(dataset="d", model="m", pretrained="p", task="t") | fields
    return make_result(**fields, metrics=metrics)


@pytest.mark.parametrize("prefix", ["per_class/", ""])  # without it in older runs
def test_classes_are_sorted_by_decreasing_f1(prefix):
    (table,) = class_tables([result([0.25, 1.0, 0.5], prefix=prefix)])
    assert [(row.name, row.f1, row.images) for row in table.best] == [
        ("c1", "100.0", "3"),
        ("c2", "50.0", "3"),
        ("c0", "25.0", "3"),
    ]
    assert not table.worst and table.num_classes == 3


@pytest.mark.parametrize("n", [MAX_CLASSES, MAX_CLASSES + 1, 200])
def test_table_of_many_classes_has_the_best_and_the_worst_once(n):
    (table,) = class_tables([result([i / n for i in range(n)])])
    shown = [row.name for row in table.best + table.worst]
    names = [f"c{i}" for i in reversed(range(n))]
    half = MAX_CLASSES // 2
    assert shown == names[:half] + names[-half:] and table.num_classes == n


def test_only_the_newest_result_and_classes_with_images_are_shown():
    old, new = result([0.1], step=3), result([0.9, 0.8], step=5)
    new["metrics"]["per_class/support/c1"] = 0.0
    (table,) = class_tables([new, old])
    assert [(row.name, row.f1) for row in table.best] == [("c0", "90.0")]
    assert class_tables([result([], step=3), result([0.5], support=0.0)]) == []
