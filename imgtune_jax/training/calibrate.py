"""Set the input statistics of heads that standardise their features.

A head with `standardize=True` subtracts each dimension's mean and divides by its standard
deviation. Both are measured here, once, on the first training examples, with the towers as they
start and as training sees the data. They are then locked and travel with the weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from imgtune_jax import models
from imgtune_jax.locking import STATISTICS
from imgtune_jax.partition import Partitioner
from imgtune_jax.types import Batch, Params

MAX_EXAMPLES = 4096


def calibrate(
    model: models.ImageTextModel, params: Params, batches: Iterator[Batch], partitioner: Partitioner
) -> Params:
    """`params` with `input_mean` and `input_std` of each standardising head measured.

    A dimension that never varies keeps a standard deviation of 1. `batches` is not read when no
    head standardises. Raises ValueError when no example is valid.
    """
    towers = [t for t in ("image", "text") if STATISTICS[0] in params.get(f"{t}_head", {})]
    if not towers:
        return params
    whole = partitioner.replicated  # every host measures on all rows
    features = jax.jit(model.tower_features, out_shardings=whole)
    rows: dict[str, list[np.ndarray]] = {t: [] for t in towers}
    seen = 0
    for batch in batches:
        valid = np.asarray(jax.device_put(batch.example_mask, whole))
        found = features(params, batch)
        for tower in towers:
            rows[tower].append(np.asarray(found[tower])[valid])
        seen += len(valid)
        if seen >= MAX_EXAMPLES:
            break
    return params | {f"{t}_head": _with_statistics(params[f"{t}_head"], rows[t]) for t in towers}


def _with_statistics(head: Params, rows: list[np.ndarray]) -> Params:
    x = np.concatenate(rows).astype(np.float64)
    if not len(x):
        raise ValueError(f"none of the first {MAX_EXAMPLES} training examples could be read")
    std = x.std(0)
    values = {"input_mean": x.mean(0), "input_std": np.where(std > 1e-6, std, 1.0)}
    placed = {
        name: jax.device_put(value.astype(np.float32), head[name].sharding)
        for name, value in values.items()
    }
    return {**head, **placed}
