from __future__ import annotations

import numpy as np
import pytest

from imgtune_jax.evals import linear_probe
from imgtune_jax.evals.linear_probe import LinearProbe, fit_logistic


def softmax(logits):
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


@pytest.mark.parametrize("case", ["weak", "strong"])
@pytest.mark.parametrize("chunk", [10_000, 32])
def test_logistic_regression_equals_scikit_learn(golden, case, chunk):
    stored = golden("evals_sklearn", case)
    got = fit_logistic(
        stored["features"],
        stored["labels"],
        num_classes=len(stored["bias"]),
        l2=float(stored["l2"]),
        tol=1e-8,
        dtype=np.float64,
        chunk=chunk,
    )
    assert got.converged
    np.testing.assert_allclose(got.weight, stored["weight"], rtol=1e-5, atol=1e-6)
    # The loss does not change if a constant is added to all biases, so compare centered biases.
    np.testing.assert_allclose(
        got.bias - got.bias.mean(), stored["bias"] - stored["bias"].mean(), atol=1e-6
    )


def test_float32_reaches_the_same_probabilities(golden):
    stored = golden("evals_sklearn", "strong")
    fit = fit_logistic(stored["features"], stored["labels"], num_classes=3, l2=float(stored["l2"]))
    got = softmax(stored["features"] @ fit.weight + fit.bias)
    # 1e-3: the default tol stops at gradients of 1e-4, near the rounding noise of float32.
    np.testing.assert_allclose(got, stored["probabilities"], atol=1e-3)


def test_converged_is_false_after_too_few_iterations(golden):
    stored = golden("evals_sklearn", "weak")
    fit = fit_logistic(
        stored["features"], stored["labels"], num_classes=5, l2=1e-4, max_iterations=2
    )
    assert not fit.converged


def clusters(fakes, seed, n=90, num_classes=3, noise=0.3):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % num_classes
    centers = np.eye(num_classes, 6) * 2
    x = centers[labels] + noise * rng.normal(size=(n, 6))
    return [fakes.record(v, label=int(y)) for v, y in zip(x, labels, strict=True)]


def test_probe_separates_clusters_and_selects_l2_on_validation_data(fakes):
    train, test = clusters(fakes, 0), clusters(fakes, 1)
    train[0] = fakes.record(None, label=0)  # unreadable: excluded
    got = LinearProbe(test, train, 3, l2s=(1e-4, 1e-2, 1.0))(fakes.Predictor())
    assert got["lp_acc1"] > 0.95 and got["num_train"] == 89 and "lp_acc5" not in got
    assert got["l2"] in (1e-4, 1e-2, 1.0) and got["val_acc1"] > 0.8


def test_l2_does_not_depend_on_the_test_source(fakes):
    train, rng = clusters(fakes, 0, noise=1.5), np.random.default_rng(3)
    val = clusters(fakes, 5, noise=1.5)
    shuffled = [fakes.record(r.image, label=int(rng.integers(3))) for r in clusters(fakes, 6)]
    l2s = (1e-6, 1e-3, 1.0, 1e3)
    selected = {
        name: LinearProbe(test, train, 3, val_source=val, l2s=l2s)(fakes.Predictor())["l2"]
        for name, test in {"same": clusters(fakes, 7), "other": shuffled}.items()
    }
    assert selected["same"] == selected["other"]


def test_scaling_uses_statistics_of_the_training_features():
    rng = np.random.default_rng(0)
    train, test = rng.normal(3, 2, (50, 4)), rng.normal(-1, 5, (20, 4))
    scaled_train, scaled_test = linear_probe.scale_features(
        train, test, scaling=linear_probe.Scaling.STANDARD
    )
    np.testing.assert_allclose([scaled_train.mean(), scaled_train.std()], [0, 1], atol=1e-5)
    np.testing.assert_allclose(scaled_test, (test - train.mean(0)) / (train.std(0) + 1e-6))
    unit, _ = linear_probe.scale_features(train, test, scaling=linear_probe.Scaling.UNIT)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1)


def test_rows_of_zeros_and_constant_columns_do_not_change_the_others():
    rng = np.random.default_rng(0)
    train, test = rng.normal(3, 2, (50, 4)).astype(np.float32), np.ones((1, 4), np.float32)
    train[7] = 0
    unit, _ = linear_probe.scale_features(train, test, scaling=linear_probe.Scaling.UNIT)
    assert unit.dtype == np.float32 and not unit[7].any()
    others = np.delete(train, 7, 0)
    expected = others / np.linalg.norm(others, axis=1, keepdims=True)
    np.testing.assert_array_equal(np.delete(unit, 7, 0), expected)

    train[:, 1], train[:, 2] = 0, 0.1  # a dead unit, and a constant with a rounding error
    scaled = linear_probe.scale_features(train, test, scaling=linear_probe.Scaling.STANDARD)
    assert scaled[0].dtype == np.float32
    np.testing.assert_allclose(scaled[0].std(0), [1, 0, 0, 1], atol=1e-5)
    np.testing.assert_allclose(scaled[1][0, 1:3], [1, 0.9], rtol=1e-6)


@pytest.mark.parametrize("scaling", linear_probe.Scaling)
def test_one_row_of_zeros_leaves_the_accuracy_unchanged(fakes, scaling):
    train, test = clusters(fakes, 0), clusters(fakes, 1)
    train[3] = fakes.record(np.zeros(6), label=0)
    test[4] = fakes.record(np.zeros(6), label=1)
    got = LinearProbe(test, train, 3, l2s=(1e-2,), scaling=scaling)(fakes.Predictor())
    assert got["lp_acc1"] > 0.95 and got["num_images"] == 90


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_row_that_is_not_finite_raises(fakes, part):
    sources = {name: clusters(fakes, i) for i, name in enumerate(("train", "val", "test"))}
    sources[part][3] = fakes.record(np.full(6, np.nan), label=0)
    probe = LinearProbe(sources["test"], sources["train"], 3, val_source=sources["val"])
    with pytest.raises(ValueError, match=r"1 of 90 image features are not finite .* row 3"):
        probe(fakes.Predictor())


def test_probe_without_validation_images_raises(fakes):
    with pytest.raises(ValueError, match="val_fraction = 0"):
        LinearProbe([], [], 3, val_fraction=0.0)
