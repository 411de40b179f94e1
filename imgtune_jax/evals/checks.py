"""Checks of evaluators' inputs."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from imgtune_jax.data import Source, read_metadata
from imgtune_jax.errors import UserError


def check_finite(rows: Float[np.ndarray, "n d"], name: str) -> None:
    """Raise UserError for a row with a NaN or an infinity; `name` describes the rows in it.

    No score compares greater than a NaN, so a positive with a NaN would have the best rank.
    """
    bad = np.flatnonzero(~np.isfinite(rows).all(1))
    if bad.size:
        raise UserError(
            f"{bad.size} of {len(rows)} {name} are not finite (the first is row {bad[0]}); "
            "mask unreadable images, or look for an overflow in the model"
        )


def checked_labels(
    source: Source, valid: Bool[np.ndarray, " n"], *, num_classes: int
) -> Int[np.ndarray, " m"]:
    """Return the labels of the readable records.

    Raises UserError for a label outside 0 to num_classes - 1, and if no record is readable.
    """
    labels = [read_metadata(source, int(i)).label for i in np.flatnonzero(valid)]
    bad = [label for label in labels if label is None or not 0 <= label < num_classes]
    if bad or not labels:
        got = (
            f"{len(bad)} of {len(labels)} readable records have an invalid label, such as {bad[:1]}"
        )
        raise UserError(f"{got}; expected one or more records, labeled 0 to {num_classes - 1}")
    return np.asarray(labels, np.int64)
