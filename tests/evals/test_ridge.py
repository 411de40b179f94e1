from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from imgtune_jax.evals.retrieval import retrieval_metrics
from imgtune_jax.evals.ridge import Ridge, ridge_baseline
from imgtune_jax.evals.ridge_retrieval import RidgeRetrieval


@pytest.mark.parametrize("n", [7, 40])  # rows: fewer than the 12 columns (dual form), or more
def test_solution_satisfies_the_normal_equations_for_every_lambda(n):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(n, 12)), rng.normal(size=(n, 3))
    lambdas = [1e-3, 1.0, 50.0]
    got = Ridge.fit(x, y, intercept=False).predictions(np.eye(12), lambdas)
    for value, weight in zip(lambdas, got, strict=True):
        expected = np.linalg.solve(x.T @ x + value * np.eye(12), x.T @ y)
        np.testing.assert_allclose(weight, expected, rtol=1e-8, atol=1e-10)


def test_lambda_that_is_not_positive_raises():
    ridge = Ridge.fit(np.eye(2), np.eye(2), intercept=False)
    with pytest.raises(ValueError, match="expected a positive number"):
        list(ridge.predictions(np.eye(2), [0.0]))


def test_row_that_is_not_finite_raises():
    x = np.eye(3)
    x[1, 2] = np.nan
    for features, targets, name in ((x, np.eye(3), "features"), (np.eye(3), x, "targets")):
        with pytest.raises(ValueError, match=f"1 of 3 training {name} are not finite"):
            Ridge.fit(features, targets, intercept=True)


def test_baseline_recovers_a_linear_map_and_reports_the_best_lambda():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(10, 6))
    x, x_test = rng.normal(2, 1, (200, 10)), rng.normal(2, 1, (30, 10))
    y, y_test = x @ w + 5, x_test @ w + 5  # only an intercept can fit the offset 5
    got = ridge_baseline(Ridge.fit(x, y, intercept=True), x_test, y_test, (1e-6, 1e6))
    assert got.best_lambda == 1e-6 and set(got.by_lambda) == {1e-6, 1e6}
    assert got.metrics == got.by_lambda[1e-6]
    assert got.metrics["text_retrieval_recall@1"] == got.metrics["image_retrieval_recall@1"] == 1


def test_baseline_is_retrieval_on_predicted_text_embeddings(fakes):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(50, 5)), rng.normal(size=(50, 4))
    x_test, y_test = rng.normal(size=(8, 5)), rng.normal(size=(16, 4))
    image_of_text = np.repeat(np.arange(8), 2)
    ridge = Ridge.fit(x, y, intercept=True)
    got = ridge_baseline(ridge, x_test, y_test, [3.0], image_of_text=image_of_text)
    xc, yc = x - x.mean(0), y - y.mean(0)
    w = np.linalg.solve(xc.T @ xc + 3.0 * np.eye(5), xc.T @ yc)
    predicted = (x_test - x.mean(0)) @ w + y.mean(0)
    assert got.metrics == retrieval_metrics(
        fakes.unit(predicted), fakes.unit(y_test), image_of_text
    )


def test_evaluator_fits_on_the_training_source_and_evaluates_on_the_other(fakes):
    rng = np.random.default_rng(2)
    w = rng.normal(size=(6, 4))

    def source(name, n):
        x = rng.normal(3, 2, (n, 6))
        texts.update({f"{name}{i}": y for i, y in enumerate(x @ w)})
        return fakes.Source(fakes.record(v, f"{name}{i}") for i, v in enumerate(x))

    texts = {}
    train, test = source("train", 80), source("test", 20)
    train[5] = fakes.record(None, "train5")
    test[3] = fakes.record(None, "test3")
    predictor = fakes.Predictor(texts)
    got = RidgeRetrieval(train, test, lambdas=(1e-3, 1e9))(predictor)
    # Unit-norm texts are not exactly linear in the images, so the small λ retrieves most, not all.
    assert got["best_lambda"] == 1e-3 and got["text_retrieval_recall@5"] > 0.9

    assert RidgeRetrieval(train, train, lambdas=(1e-3,))(predictor)["text_retrieval_recall@5"] > 0.9
    encoded = [texts[0] for texts in predictor.calls]
    assert encoded == ["train0", "test0", "train0"]  # the second evaluation reuses the fit
    standardized = RidgeRetrieval(train, test, standardize=True)
    standardized(predictor)
    assert [texts[0] for texts in predictor.calls][3:] == ["train0", "test0"]


def test_one_row_of_zeros_leaves_the_retrieval_of_others_unchanged(fakes):
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(40, 5))
    vectors[7] = 0  # both of an image and of a text
    texts = {f"t{i}": v for i, v in enumerate(vectors)}
    source = fakes.Source(fakes.record(v, f"t{i}") for i, v in enumerate(vectors))
    predictor = SimpleNamespace(
        image_features=fakes.Predictor().image_features,
        text_features=lambda names: np.stack([texts[name] for name in names]),
        memoize=lambda key, compute: compute(),
    )
    got = RidgeRetrieval(source, source, lambdas=(1e-3,))(predictor)
    assert got["text_retrieval_recall@1"] > 0.9 and got["image_retrieval_recall@1"] > 0.9
