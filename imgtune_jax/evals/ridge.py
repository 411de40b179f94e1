"""Ridge regression in closed form, and the retrieval baseline that it makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from imgtune_jax.evals.checks import check_finite
from imgtune_jax.evals.retrieval import retrieval_metrics


def ridge_solutions(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n c"], lambdas: Sequence[float]
) -> Iterator[Float[np.ndarray, "d c"]]:
    """argmin_w ‖x w - y‖² + λ ‖w‖² for every λ > 0, in float64.

    One eigendecomposition serves all: of xᵀx, (xᵀx + λ)⁻¹ xᵀy (primal), or, with fewer rows than
    columns, of x xᵀ, xᵀ (x xᵀ + λ)⁻¹ y (dual).
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    primal = x.shape[0] >= x.shape[1]
    values, vectors = np.linalg.eigh(x.T @ x if primal else x @ x.T)
    left = vectors if primal else x.T @ vectors
    right = vectors.T @ (x.T @ y if primal else y)
    for value in lambdas:
        if value <= 0:
            raise ValueError(f"λ = {value}; ridge regression needs a positive one")
        yield (left / (values.clip(min=0) + value)) @ right


class RidgeBaseline(NamedTuple):
    """The best λ of a sweep, its metrics, and every λ's."""

    best_lambda: float
    metrics: dict[str, float]
    by_lambda: dict[float, dict[str, float]]


def ridge_baseline(
    train_features: Float[np.ndarray, "n d"],
    train_text_emb: Float[np.ndarray, "n e"],
    test_features: Float[np.ndarray, "m d"],
    test_text_emb: Float[np.ndarray, "k e"],
    lambdas: Sequence[float] = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
    *,
    image_of_text: Int[np.ndarray, " k"] | None = None,
    image_group: Int[np.ndarray, " m"] | None = None,
    ks: Sequence[int] = (1, 5, 10),
    select: str = "text_retrieval_recall@1",
    mesh: Mesh | None = None,
) -> RidgeBaseline:
    """Regress text embeddings on image features, then retrieve by cosine: no training at all.

    Row i of `train_text_emb` is the text of row i of `train_features`. Both sides are centred by
    their training means, which stands for a free bias; a test image's embedding is its predicted
    text embedding. `image_of_text` is as in `retrieval_metrics`; by default text i is image i's.

    λ is chosen by `select` on the test data itself. That flatters the baseline, never ours.
    """
    for rows, what in (
        (train_features, "training features"),
        (train_text_emb, "training text embeddings"),
        (test_features, "test features"),
    ):
        check_finite(rows, what)
    if image_of_text is None:
        image_of_text = np.arange(len(test_text_emb))
    mean_x = train_features.mean(0, dtype=np.float64)
    mean_y = train_text_emb.mean(0, dtype=np.float64)
    weights = ridge_solutions(train_features - mean_x, train_text_emb - mean_y, lambdas)
    by_lambda = {}
    for value, weight in zip(lambdas, weights, strict=True):
        image_emb = (test_features - mean_x) @ weight + mean_y
        by_lambda[float(value)] = retrieval_metrics(
            _unit(image_emb),
            _unit(test_text_emb),
            image_of_text,
            ks=ks,
            image_group=image_group,
            mesh=mesh,
        )
    best = max(by_lambda, key=lambda value: by_lambda[value][select])
    return RidgeBaseline(best, by_lambda[best], by_lambda)


def _unit(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return x / np.linalg.norm(x, axis=1, keepdims=True)
