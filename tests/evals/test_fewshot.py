from __future__ import annotations

import numpy as np
import pytest

from imgtune_jax.evals import fewshot
from imgtune_jax.evals.fewshot import FewShot


@pytest.mark.parametrize("shots", [1, 40])  # fewer rows than columns; more rows than columns
def test_prediction_solves_the_normal_equations(shots):
    rng = np.random.default_rng(shots)
    num_classes, d = 4, 8
    y = np.repeat(np.arange(num_classes), shots)
    x = rng.normal(size=(num_classes, d))[y] + rng.normal(size=(len(y), d))
    test = rng.normal(size=(200, d))
    got = fewshot.fewshot_predictions(x, y, test, num_classes=num_classes, l2=5.0)
    mean, std = x.mean(0), x.std(0) + 1e-5
    inputs = np.c_[(x - mean) / std, np.full(len(x), 100.0)]
    targets = np.where(np.arange(num_classes) == y[:, None], 1.0, -1.0)
    w = np.linalg.solve(inputs.T @ inputs + 5.0 * np.eye(d + 1), inputs.T @ targets)
    expected = (np.c_[(test - mean) / std, np.full(200, 100.0)] @ w).argmax(1)
    np.testing.assert_array_equal(got, expected)


def test_shots_are_balanced_nested_and_determined_by_the_seed():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 12))
    five = fewshot.sample_shots(labels, shots=5, num_classes=5, seed=1)
    ten = fewshot.sample_shots(labels, shots=10, num_classes=5, seed=1)
    assert np.bincount(labels[five]).tolist() == [5] * 5 and set(five) < set(ten)
    np.testing.assert_array_equal(
        five, fewshot.sample_shots(labels, shots=5, num_classes=5, seed=1)
    )
    assert set(five) != set(fewshot.sample_shots(labels, shots=5, num_classes=5, seed=2))


def test_too_few_examples_of_a_class_raise():
    with pytest.raises(ValueError, match=r"1 of 2 classes have fewer .*\{1: 1\}"):
        fewshot.sample_shots(np.array([0, 0, 1]), shots=2, num_classes=2, seed=0)


def test_evaluator_reports_every_sample_and_their_mean(fakes):
    rng = np.random.default_rng(0)

    def source(n):
        return [
            fakes.record(np.eye(3, 5)[i % 3] + 0.4 * rng.normal(size=5), label=i % 3)
            for i in range(n)
        ]

    got = FewShot(source(60), source(60), 3, shots=(1, 10), seeds=2, l2=1.0)(fakes.Predictor())
    accuracies = [got["10shot_acc1_seed0"], got["10shot_acc1_seed1"]]
    assert got["10shot_acc1"] == np.mean(accuracies) > 0.8
    assert set(got) == {f"{k}shot_acc1{s}" for k in (1, 10) for s in ("", "_seed0", "_seed1")}


@pytest.mark.parametrize("constant", [0.0, 0.1])
def test_one_row_of_zeros_and_a_constant_column_do_not_change_the_predictions(constant):
    rng = np.random.default_rng(0)
    y = np.arange(30) % 3
    x = np.eye(3, 6)[y] + 0.1 * rng.normal(size=(30, 6))
    x[5], x[:, 4] = 0, constant
    test = np.eye(3, 6)
    test[:, 4] = [-50, 1e6, 3]
    got = fewshot.fewshot_predictions(x, y, test, num_classes=3, l2=1.0)
    assert got.tolist() == [0, 1, 2]


def test_row_that_is_not_finite_raises():
    x, y = np.arange(180.0).reshape(30, 6) % 7, np.arange(30) % 3
    bad = x.copy()
    bad[2, 1] = np.inf
    for features, queries in ((bad, x), (x, bad)):
        with pytest.raises(ValueError, match=r"1 of 30 .* features are not finite .* row 2"):
            fewshot.fewshot_predictions(features, y, queries, num_classes=3, l2=1.0)
