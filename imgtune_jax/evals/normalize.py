"""Scaling of features: rows to unit norm, columns to mean 0 and variance 1."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def normalize_rows(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Scale each row to norm 1. A row of zeros stays zero, as in CLIP_benchmark."""
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm == 0, 1, norm)


def column_scales(
    x: Float[np.ndarray, "n d"], *, epsilon: float
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """Return the mean of each column, and its divisor: the standard deviation plus `epsilon`.

    Both are in float64. The divisor of a constant column is 1. A column counts as constant if its
    standard deviation is below the rounding error of float32, which must not be scaled up.
    """
    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    return mean, np.where(std <= 1e-6 * np.abs(mean), 1.0, std + epsilon)
