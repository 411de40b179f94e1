"""What evaluators refuse to score."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from imgtune_jax.data import Source, read_metadata


def check_finite(rows: Float[np.ndarray, "n d"], what: str) -> None:
    """Raise ValueError for a row with a NaN: no score compares greater than it, so it would win."""
    broken = np.flatnonzero(~np.isfinite(rows).all(1))
    if broken.size:
        raise ValueError(
            f"{broken.size} of {len(rows)} {what} are not finite (the first is row {broken[0]}); "
            "mask broken images out, or look for the overflow in the model"
        )


def checked_labels(
    source: Source, valid: Bool[np.ndarray, " n"], *, num_classes: int
) -> Int[np.ndarray, " m"]:
    """The labels of the readable records; raises ValueError for one that names no class."""
    labels = [read_metadata(source, int(i)).label for i in np.flatnonzero(valid)]
    wrong = [label for label in labels if label is None or not 0 <= label < num_classes]
    if wrong or not labels:
        what = f"{len(wrong)} of {len(labels)} records have a label such as {wrong[:1]}"
        raise ValueError(f"{what}; every record needs one from 0 to {num_classes - 1}")
    return np.asarray(labels, np.int64)
