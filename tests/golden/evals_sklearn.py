"""Generate `evals_sklearn.npz`: multinomial logistic regressions by scikit-learn 1.9.1.

pip install scikit-learn && python tests/golden/evals_sklearn.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression


def case(seed: int, n: int, d: int, num_classes: int, l2: float) -> dict[str, np.ndarray]:
    """Fit overlapping clusters whose mean is not 0, so that the bias matters."""
    rng = np.random.default_rng(seed)
    labels = np.r_[np.arange(num_classes), rng.integers(0, num_classes, n - num_classes)]
    features = rng.normal(size=(num_classes, d))[labels] + 1.2 * rng.normal(size=(n, d)) + 0.7
    fit = LogisticRegression(C=1 / (n * l2), tol=1e-10, max_iter=10_000).fit(features, labels)
    return {
        "features": features,
        "labels": labels,
        "l2": np.float64(l2),
        "weight": fit.coef_.T,
        "bias": fit.intercept_,
        "probabilities": fit.predict_proba(features),
    }


if __name__ == "__main__":
    cases = {"weak": case(0, 120, 6, 5, 1e-4), "strong": case(1, 80, 9, 3, 0.3)}
    arrays = {f"{name}/{k}": v for name, values in cases.items() for k, v in values.items()}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **arrays)
