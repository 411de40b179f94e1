"""Feature cache: the output of each tower's frozen prefix, computed once and read from disk later.

A store's folder is named by a digest of everything that its values depend on: frozen weights,
architecture, version of the towers' code, precision of matrix products, preprocessing,
augmentation, views, seed and data. So a run never reads values that were computed from other
settings, and all runs with the same key share one store.

A view is one random augmentation of an image, or one sampled caption of a record. Training fills a
store: in the first epoch of each view the frozen prefix runs batch by batch, and later epochs read
its rows. `fill_cache` fills a store before training.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from imgtune_jax import data, models, param_tree
from imgtune_jax.data.feature_store import differing_keys, read_manifest
from imgtune_jax.errors import UserError
from imgtune_jax.training.batch_source import BatchSource
from imgtune_jax.training.experiment import Experiment
from imgtune_jax.types import Batch, Params

log = logging.getLogger("imgtune_jax.training.feature_cache")


def build_batch_source(
    experiment: Experiment, frozen: Params, *, bad_records: Mapping[str, int] | None = None
) -> BatchSource:
    """Build the source of training batches, with a store for each cached tower.

    `frozen` contains all frozen parameters. `bad_records` has the counts of bad records up to the
    step that a run is resumed at.
    """
    stores = open_stores(experiment, frozen)
    prefix_fns = {tower: _compile_prefix(experiment, frozen, tower) for tower in stores}
    pipeline = experiment.pipeline
    if stores or bad_records:
        pipeline = dataclasses.replace(pipeline, stores=stores, counted=bad_records or {})
    return BatchSource(experiment, pipeline, prefix_fns)


def fill_cache(experiment: Experiment) -> dict[str, data.FeatureStore]:
    """Fill the stores before training, in the order of the records; return the stores by tower.

    A call continues where an interrupted one stopped. Raises UserError if the config caches no
    tower.
    """
    _, frozen = experiment.split_params(experiment.init_params())
    batch_source = build_batch_source(experiment, frozen)
    stores = dict(batch_source.stores)
    if not stores:
        raise UserError(
            "nothing to cache: set config.cache.path, and lock a tower whose number of views "
            "(config.cache.image_views or text_views) is not 0"
        )
    for tower, store in stores.items():
        unused = {"tokenizer": None} if tower == "image" else {"transform": None}
        pipeline = dataclasses.replace(
            batch_source.pipeline, shuffle=False, stores={tower: store}, **unused
        )
        ordered = dataclasses.replace(batch_source, pipeline=pipeline)
        total, size = store.views * store.num_records, pipeline.batch_size
        first = store.first_missing // size
        description = f"frozen prefix of the {tower} tower"
        with tqdm(total=total, initial=first * size, unit="row", desc=description) as bar:
            steps = range(first, -(-total // size))
            for step, _ in zip(steps, ordered.batches(first), strict=False):
                bar.update(min(size, total - step * size))
        ordered.flush()
    return stores


def open_stores(experiment: Experiment, frozen: Params) -> dict[str, data.FeatureStore]:
    """Open the store of each tower that has a frozen prefix and views in config.cache."""
    cfg, stores = experiment.config.cache, {}
    if cfg.path is None:
        return stores
    num_records = len(experiment.source)
    for tower, views in {"image": cfg.image_views, "text": cfg.text_views}.items():
        if views and experiment.model.frozen_prefix(tower) is not None:
            key = cache_key(experiment, frozen, tower)
            shape = _feature_shape(experiment, tower)
            name = _digest([key, views, shape, cfg.dtype])
            folder = cache_root(cfg.path) / f"{tower}-{name}"
            if not folder.exists():
                _log_key_changes(folder, key)
            stores[tower] = data.FeatureStore.open(
                folder, views=views, num_records=num_records, shape=shape, dtype=cfg.dtype, key=key
            )
    return stores


def cache_root(path: str) -> Path:
    """Return the folder that `config.cache.path` names; "auto" means the user's cache folder."""
    if path != "auto":
        return Path(path)
    user_cache = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(user_cache) / "imgtune_jax" / "features"


def cache_key(experiment: Experiment, frozen: Params, tower: str) -> dict[str, Any]:
    """Return everything that a cached value depends on, as a dict that JSON can represent.

    The keys of the dict are part of the hash in the name of a store's folder. Do not rename them,
    or existing stores would not be found.
    """
    config = experiment.config
    prefix = experiment.model.frozen_prefix(tower)
    assert prefix is not None, "only a frozen prefix is cached"
    key: dict[str, Any] = {
        "weights": param_tree.params_digest(_frozen_prefix_params(experiment, frozen, tower)),
        "architecture": config.model[tower],
        "layers": prefix.num_layers,
        "compute_dtype": config.model.get("dtype"),
        "matmul_precision": _matmul_precision(experiment),
        "code": models.TOWERS_VERSION,
        "source": experiment.source.fingerprint,
    }
    if tower == "image":
        normalization = ("image_size", "image_mean", "image_std")
        key["normalisation"] = {k: v for k, v in config.model.items() if k in normalization}
        key["preprocess"] = config.data.transforms or config.preprocess
        key["pixels"] = data.TRANSFORMS_VERSION
        # Without augmentation, the pixels do not depend on the seed.
        key["seed"] = config.seed if config.data.transforms else None
    else:
        key["tokenizer"] = experiment.tokenizer.fingerprint
        key["captions"], key["seed"] = config.data.caption_weights, config.seed
        if config.data.prefixes:
            key["prefixes"] = config.data.prefixes
    return json.loads(json.dumps(key))


def _matmul_precision(experiment: Experiment) -> str:
    """Return the precision of float32 matrix products, and the platform, which has a default one.

    By default, a TPU rounds float32 operands to bfloat16, a GPU to TF32, and a CPU not at all.
    """
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return f"{precision or 'default'} on {experiment.partitioner.mesh.devices.flat[0].platform}"


def _log_key_changes(folder: Path, key: Mapping[str, Any]) -> None:
    """Log which entries of a new key differ from the most similar store of the same tower."""
    tower = folder.name.partition("-")[0]
    manifests = [read_manifest(other) for other in folder.parent.glob(f"{tower}-*")]
    changes = [differing_keys({k: m[k] for k in key if k in m}, key) for m in manifests if m]
    if changes:
        entries = ", ".join(min(changes, key=len))
        log.info("these features are not cached yet; the most similar store differs in %s", entries)


def _compile_prefix(
    experiment: Experiment, frozen: Params, tower: str
) -> Callable[[Batch], jax.Array]:
    """Return the jitted function batch -> f32[b …], the output of the tower's frozen prefix."""
    apply = jax.jit(
        functools.partial(experiment.model.apply_frozen_prefix, tower=tower),
        out_shardings=experiment.partitioner.batch_sharding,
    )
    params = _frozen_prefix_params(experiment, frozen, tower)
    return lambda batch: apply(params, batch=batch)


def _frozen_prefix_params(experiment: Experiment, frozen: Params, tower: str) -> Params:
    """Return the parameters of a tower's frozen prefix."""
    return param_tree.select(
        frozen,
        lambda path: path.startswith(f"{tower}/") and experiment.model.in_frozen_prefix(path),
    )


def _feature_shape(experiment: Experiment, tower: str) -> tuple[int, ...]:
    """Return the shape of one row of a tower's features: (d,) if pooled, else tokens (l, d)."""
    size, length = experiment.config.model["image_size"], experiment.tokenizer.length
    channels = len(experiment.model.image_mean)

    def one_row(params: Params) -> jax.Array:
        batch = Batch(
            example_mask=jnp.ones(1, bool),
            image=jnp.zeros((1, size, size, channels), jnp.uint8),
            text=jnp.zeros((1, length), jnp.int32),
            text_mask=jnp.ones((1, length), bool),
        )
        return experiment.model.apply_frozen_prefix(params, tower=tower, batch=batch)

    return jax.eval_shape(one_row, experiment.abstract_params).shape[1:]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]
