"""Measure the input statistics of heads that standardize their features.

A head with `standardize=True` subtracts each dimension's mean and divides by its standard
deviation. Both are measured once, before the first step, on the first training examples with the
initial towers and the training augmentation. They are frozen and saved with the weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from imgtune_jax import models
from imgtune_jax.errors import UserError
from imgtune_jax.locking import STATISTICS
from imgtune_jax.partition import Partitioner
from imgtune_jax.types import MODALITIES, Batch, Params

MAX_EXAMPLES = 4096  # rounded up to full batches; unreadable records count


def calibrate(
    model: models.ImageTextModel, params: Params, batches: Iterator[Batch], partitioner: Partitioner
) -> Params:
    """Return `params` with measured `input_mean` and `input_std` in each standardizing head.

    A dimension that never varies gets a standard deviation of 1. No batch is read if no head
    standardizes. Raises UserError if no example is valid.
    """
    towers = [t for t in MODALITIES if STATISTICS[0] in params.get(f"{t}_head", {})]
    if not towers:
        return params
    replicated = partitioner.replicated  # every host measures on the rows of all hosts
    tower_features = jax.jit(model.tower_features, out_shardings=replicated)
    features: dict[str, list[np.ndarray]] = {t: [] for t in towers}
    num_examples = 0
    for batch in batches:
        valid = np.asarray(jax.device_put(batch.example_mask, replicated))
        batch_features = tower_features(params, batch)
        for tower in towers:
            features[tower].append(np.asarray(batch_features[tower])[valid])
        num_examples += len(valid)
        if num_examples >= MAX_EXAMPLES:
            break
    heads = {f"{t}_head": _with_statistics(params[f"{t}_head"], features[t]) for t in towers}
    return params | heads


def _with_statistics(head: Params, features: list[np.ndarray]) -> Params:
    """Return a head's parameters with the mean and std of features [n d], n examples."""
    x = np.concatenate(features).astype(np.float64)
    if not len(x):
        raise UserError(
            f"none of the first {MAX_EXAMPLES} training examples could be read, so the heads' "
            f"input statistics cannot be measured; check config.data.source"
        )
    std = x.std(0)
    values = {"input_mean": x.mean(0), "input_std": np.where(std > 1e-6, std, 1.0)}
    statistics = {
        name: jax.device_put(value.astype(np.float32), head[name].sharding)
        for name, value in values.items()
    }
    return {**head, **statistics}
