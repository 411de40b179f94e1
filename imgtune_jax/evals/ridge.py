"""Ridge regression in closed form, and a retrieval baseline that uses it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from imgtune_jax.errors import UserError
from imgtune_jax.evals.checks import check_finite
from imgtune_jax.evals.normalize import normalize_rows
from imgtune_jax.evals.retrieval import retrieval_metrics


@dataclass(frozen=True)
class Ridge:
    """argmin_w ‖x w - y‖² + λ ‖w‖² for every λ > 0, in float64, from one eigendecomposition.

    The primal form w = (xᵀx + λ)⁻¹ xᵀy decomposes xᵀx. If x [n d] has fewer rows than columns, the
    dual form w = xᵀ (x xᵀ + λ)⁻¹ y decomposes x xᵀ. With the eigenvalues `values`, both forms are
    w = left diag(1 / (values + λ)) right. `mean_x` is subtracted from inputs, and `mean_y` is added
    to predictions. Axis letters: d features, c targets, r eigenvalues.
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
        """Decompose. With `intercept`, x and y are centered: the bias is not regularized."""
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
        """Yield the predictions for new rows, for each λ. Raises UserError unless λ > 0."""
        projected = (x - self.mean_x) @ self.left
        for lam in lambdas:
            if lam <= 0:
                raise UserError(f"λ = {lam}; expected a positive number")
            yield (projected / (self.values + lam)) @ self.right + self.mean_y


class RidgeBaseline(NamedTuple):
    """The best λ of a sweep, its metrics, and the metrics of every λ."""

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
    """Evaluate retrieval with a regression from image features to text embeddings.

    The embedding of a test image is its predicted text embedding. Images and texts are compared by
    cosine similarity. `image_of_text` is as in `retrieval_metrics`; by default, text i belongs to
    image i. The λ with the best value of the metric `select` on the test data is selected, which
    favors the baseline. Axis letters: m test images, d features, k texts, e embedding width.
    """
    check_finite(test_features, "test features")
    check_finite(test_text_emb, "test text embeddings")
    if image_of_text is None:
        image_of_text = np.arange(len(test_text_emb))
    text_emb = normalize_rows(test_text_emb)
    by_lambda = {}
    for lam, emb in zip(lambdas, ridge.predictions(test_features, lambdas), strict=True):
        by_lambda[float(lam)] = retrieval_metrics(
            normalize_rows(emb), text_emb, image_of_text, ks=ks, image_group=image_group, mesh=mesh
        )
    best = max(by_lambda, key=lambda lam: by_lambda[lam][select])
    return RidgeBaseline(best, by_lambda[best], by_lambda)
