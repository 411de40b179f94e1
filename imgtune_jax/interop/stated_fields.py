"""Comparison of a config with what the files beside a weight file state.

With another activation, epsilon, number of heads, pooling or image preprocessing than in training,
weights load and produce plausible but wrong embeddings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from imgtune_jax.errors import UserError

StatedFields = dict[str, dict[str, Any]]  # file name -> {field: value}

# Fields of a tower on which its outputs do not depend in inference.
FREE_FIELDS = {
    *("parent", "name", "dtype", "constrain", "remat", "scan", "num_frozen_layers"),
    *("hand_written_gradients", "dropout", "patch_dropout"),
}


def tower_fields(tower: Any) -> dict[str, Any]:
    """Return the fields of a tower on which its outputs depend."""
    names = {field.name for field in dataclasses.fields(tower)} - FREE_FIELDS
    if getattr(tower, "causal", False) and getattr(tower, "pool", None) == "eot":
        names -= {"mask_padding"}  # the end-of-text token attends to no padding anyway
    return {name: getattr(tower, name) for name in names}


def check_stated_fields(
    stated: StatedFields,
    configured: Mapping[str, Any],
    *,
    ignore: Collection[str],
    path: Path,
) -> None:
    """Raise UserError listing each field whose value in a file differs from the configured one.

    Fields that only one of the two has, or that are in `ignore`, are not compared. `path` is the
    weight file, which the error names.
    """
    if unknown := sorted(set(ignore) - configured.keys()):
        raise UserError(
            f"weights: ignore has {', '.join(unknown)}; expected some of "
            f"{', '.join(sorted(configured))}"
        )
    problems = [
        f"{field}: {value!r} in {file}, {configured[field]!r} in the config"
        for file, fields in stated.items()
        for field, value in sorted(fields.items())
        if field in configured and field not in ignore and not _is_equal(value, configured[field])
    ]
    if problems:
        raise UserError(
            f"the files beside {path} contradict the config; change the config, or add fields that "
            "are to differ to `ignore` in config.weights:\n  " + "\n  ".join(problems)
        )


def _is_equal(a: Any, b: Any) -> bool:
    """Whether two values are the same; floats may be rounded to three digits."""
    if a == b or (isinstance(a, int) and isinstance(b, int)):
        return a == b
    try:
        x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    except (TypeError, ValueError):  # not numbers
        return False
    return x.shape == y.shape and bool(np.allclose(x, y, rtol=1e-3, atol=0))
