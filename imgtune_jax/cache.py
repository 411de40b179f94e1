"""The locked tower is a function of its input, so compute it once.

`features` returns the image tower's pooled outputs for `views` seeded augmentations of every
training image. The stored file is named by a digest of all that the values depend on: locked
weights, architecture, preprocessing, augmentation, seed, views and data. A wrong one cannot be
served, and every run with the same key shares it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from imgtune_jax import data
from imgtune_jax.train import checkpoint
from imgtune_jax.train.experiment import Experiment
from imgtune_jax.types import Params

log = logging.getLogger("imgtune_jax.cache")


def key(experiment: Experiment, params: Params, source: data.Source) -> str:
    """Digest of everything that a cached value depends on."""
    c = experiment.config
    parts: dict[str, Any] = {
        "weights": checkpoint.digest(params["image"]),
        "tower": c.model["image"],
        "normalisation": {k: v for k, v in c.model.items() if k.startswith("image_")},
        "dtype": c.model.get("dtype"),
        "preprocess": c.preprocess,
        "transforms": c.data.transforms,
        "seed": c.seed,
        "views": c.cache.views,
        "source": source.fingerprint,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def features(
    experiment: Experiment, params: Params, source: data.Source
) -> tuple[np.ndarray, np.ndarray]:
    """(features f32[views n d], valid bool[n]) of the training images, read from disk or computed.

    View v of image i is drawn as epoch v of an uncached run draws it, so with as many views as
    epochs the cached run sees what the uncached one does.
    """
    folder = Path(experiment.config.cache.dir)
    name = key(experiment, params, source)
    found, valid_path = folder / f"{name}.npy", folder / f"{name}.valid.npy"
    if not found.exists():
        values, valid = _compute(experiment, params, source)
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _write(valid_path, valid)
            _write(found, values)  # last: its presence says that both are whole
        return values, valid
    log.info("using cached image features %s", found)
    return np.load(found, mmap_mode="r"), np.load(valid_path)


def _compute(
    experiment: Experiment, params: Params, source: data.Source
) -> tuple[np.ndarray, np.ndarray]:
    c, n = experiment.config, len(source)
    pipeline = data.Pipeline.for_views(
        source=source,
        transform=data.build_transform(c.data.transforms or c.preprocess),
        batch_size=c.batch_size,
        seed=c.seed,
        host_index=jax.process_index(),
        host_count=jax.process_count(),
        num_threads=c.data.num_threads,
        num_workers=c.data.num_workers,
        max_bad_fraction=c.data.max_bad_fraction,
        min_records=c.data.min_records,
    )
    put, whole = experiment.partitioner.put, experiment.partitioner.replicated
    program = jax.jit(experiment.model.features_image, out_shardings=whole)
    total = c.cache.views * n
    rows, masks = [], []
    batches = pipeline.batches(0)
    with tqdm(total=total, unit="img", desc="locked tower, once", dynamic_ncols=True) as bar:
        for start in range(0, total, c.batch_size):
            batch = put(next(batches))
            rows.append(np.asarray(program({"image": params["image"]}, batch.image)))
            masks.append(np.asarray(jax.device_put(batch.example_mask, whole)))
            bar.update(min(c.batch_size, total - start))
    values = np.concatenate(rows)[:total]
    valid = np.asarray(np.concatenate(masks)[:total].reshape(c.cache.views, n).all(0))
    return values.reshape(c.cache.views, n, -1), valid


def _write(path: Path, array: np.ndarray) -> None:
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    with temporary.open("wb") as f:
        np.save(f, array)
    temporary.replace(path)
