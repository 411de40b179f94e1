from __future__ import annotations

import numpy as np
import pytest

from imgtune_jax.evals.per_class import per_class_metrics, per_class_scores, split_per_class
from imgtune_jax.evals.retrieval import curve_names
from imgtune_jax.evals.zeroshot import ZeroShot

# Each of these is a metric's name, looks like one, or has the separator of metric names.
NAMES = (
    "acc1",
    "loss",
    "f1/dog",
    "cat/dog",
    "recall@1",
    "R@1",
    "text_retrieval_",
    "line\nbreak",
    "",
)


def scores(num_classes):
    labels = np.arange(num_classes)
    return per_class_scores(labels, labels, num_classes=num_classes)


def test_no_class_name_collides_with_a_metric_or_another_class(fakes):
    eye = np.eye(len(NAMES))
    source = [fakes.record(x, label=i) for i, x in enumerate(eye)]
    texts = {f"p{name}": x for name, x in zip(NAMES, eye, strict=True)}
    templates = {name: [f"p{name}"] for name in NAMES}
    evaluator = ZeroShot(source, NAMES, templates, per_class=True)
    got = evaluator(fakes.Predictor(texts))
    whole, by_class = split_per_class(got)
    assert set(whole) == set(ZeroShot(source, NAMES, templates)(fakes.Predictor(texts)))
    assert tuple(by_class) == NAMES
    assert all(x == dict(precision=1, recall=1, f1=1, support=1) for x in by_class.values())
    assert len(curve_names(got)) == len(got)


@pytest.mark.parametrize("names", [("a", "a", "a (1)"), ("a", "b", "a")])
def test_equal_names_are_told_apart_by_their_labels(names):
    _, by_class = split_per_class(per_class_metrics(scores(3), names))
    assert list(by_class) == [f"{name} ({label})" for label, name in enumerate(names)]


def test_metrics_of_older_runs_are_split_too():
    old = {"acc1": 0.5, "f1/cat": 0.25, "support/cat": 3.0, "f1/a/b": 1.0}
    assert split_per_class(old) == (
        {"acc1": 0.5},
        {"cat": {"f1": 0.25, "support": 3.0}, "a/b": {"f1": 1.0}},
    )
