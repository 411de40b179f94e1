"""Set the input statistics of heads that standardise their features.

A locked tower's features have means and scales that differ by orders of magnitude between
dimensions; a linear head on top learns them slowly. A head with `standardize=True` subtracts each
dimension's mean and divides by its standard deviation, measured here, once, on training data with
the towers as they start. The statistics are then locked and travel with the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from imgtune_jax.types import Params

MAX_EXAMPLES = 4096
STATISTICS = ("input_mean", "input_std")


def calibrate(params: Params, features: dict[str, Callable[[], np.ndarray]]) -> Params:
    """`params` with `input_mean` and `input_std` of each head set from its tower's features.

    `features["image"]()` gives f32[n d], called only when that head standardises. A dimension that
    never varies gets a standard deviation of 1.
    """
    out = dict(params)
    for tower, rows in features.items():
        head = out.get(f"{tower}_head", {})
        if not all(name in head for name in STATISTICS):
            continue
        x = np.asarray(rows(), np.float64)
        std = x.std(0)
        values = {"input_mean": x.mean(0), "input_std": np.where(std > 1e-6, std, 1.0)}
        placed = {
            name: jax.device_put(value.astype(np.float32), head[name].sharding)
            for name, value in values.items()
        }
        out[f"{tower}_head"] = {**head, **placed}
    return out
