"""Ridge regression in closed form, and the retrieval baseline that it makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from imgtune_jax.evals.checks import check_finite
from imgtune_jax.evals.retrieval import retrieval_metrics


@dataclass(frozen=True)
class Ridge:
    """argmin_w ‖x w - y‖² + λ ‖w‖² for every λ > 0, in float64, from one eigendecomposition.

    Of xᵀx, for (xᵀx + λ)⁻¹ xᵀy (primal), or, with fewer rows than columns, of x xᵀ, for
    xᵀ (x xᵀ + λ)⁻¹ y (dual): w = left (values + λ)⁻¹ right. The means are taken off before and
    put back after.
    """

    mean_x: Float[np.ndarray, " d"]
    mean_y: Float[np.ndarray, " c"]
    left: Float[np.ndarray, "d r"]
    values: Float[np.ndarray, " r"]
    right: Float[np.ndarray, "r c"]

    @classmethod
    def fit(
        cls, x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n c"], *, intercept: bool
    ) -> Ridge:
        """Decompose. With an `intercept`, both sides are centred, which frees a bias of the λ."""
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        check_finite(x, "training features")
        check_finite(y, "training targets")
        mean_x, mean_y = (z.mean(0) if intercept else np.zeros(z.shape[1]) for z in (x, y))
        x, y = x - mean_x, y - mean_y
        primal = x.shape[0] >= x.shape[1]
        values, vectors = np.linalg.eigh(x.T @ x if primal else x @ x.T)
        left = vectors if primal else x.T @ vectors
        right = vectors.T @ (x.T @ y if primal else y)
        return cls(mean_x, mean_y, left, values.clip(min=0), right)

    def predictions(
        self, x: Float[np.ndarray, "m d"], lambdas: Sequence[float]
    ) -> Iterator[Float[np.ndarray, "m c"]]:
        """What each λ's w predicts of new rows. Raises ValueError for a λ that is not positive."""
        projected = (x - self.mean_x) @ self.left
        for value in lambdas:
            if value <= 0:
                raise ValueError(f"λ = {value}; ridge regression needs a positive one")
            yield (projected / (self.values + value)) @ self.right + self.mean_y


class RidgeBaseline(NamedTuple):
    """The best λ of a sweep, its metrics, and every λ's."""

    best_lambda: float
    metrics: dict[str, float]
    by_lambda: dict[float, dict[str, float]]


def ridge_baseline(
    ridge: Ridge,
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
    """Retrieve by cosine with a regression of text embeddings on image features: no training.

    A test image's embedding is its predicted text embedding. `image_of_text` is as in
    `retrieval_metrics`; by default text i is image i's.

    λ is chosen by `select` on the test data itself. That flatters the baseline, never ours.
    """
    check_finite(test_features, "test features")
    check_finite(test_text_emb, "test text embeddings")
    if image_of_text is None:
        image_of_text = np.arange(len(test_text_emb))
    text_emb = _unit(test_text_emb)
    by_lambda = {}
    for value, emb in zip(lambdas, ridge.predictions(test_features, lambdas), strict=True):
        by_lambda[float(value)] = retrieval_metrics(
            _unit(emb), text_emb, image_of_text, ks=ks, image_group=image_group, mesh=mesh
        )
    best = max(by_lambda, key=lambda value: by_lambda[value][select])
    return RidgeBaseline(best, by_lambda[best], by_lambda)


def _unit(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return x / np.linalg.norm(x, axis=1, keepdims=True)
