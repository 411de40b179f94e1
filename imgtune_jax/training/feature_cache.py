"""The locked part of a tower is a function of its input, so compute it once.

What it gives is stored under a digest of all that it depends on: the locked weights, the
architecture, preprocessing and augmentation, the views and their seed, and the data. A wrong store
cannot be served, and every run with the same key shares one. Training fills it on its way: in the
first epoch of each view the locked part is run batch by batch, later its rows are read. `build`
does the same ahead of time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from imgtune_jax import data, param_tree
from imgtune_jax.data.feature_store import differing_keys
from imgtune_jax.training.batch_source import PlainFeed
from imgtune_jax.training.experiment import Experiment
from imgtune_jax.types import Batch, Params

log = logging.getLogger("imgtune_jax.training.feature_cache")


@dataclass(frozen=True)
class CachedFeed:
    """A Feed whose batches bring what the locked part of each tower in `pipeline.stores` gave."""

    pipeline: data.Pipeline
    prefix_fns: Mapping[str, Callable[[Batch], jax.Array]]
    exp: Experiment

    @property
    def stores(self) -> Mapping[str, data.FeatureStore]:
        """The stores, by tower."""
        return self.pipeline.stores

    @property
    def store_paths(self) -> dict[str, str]:
        """Where the stores are, by tower."""
        return {tower: str(store.folder.absolute()) for tower, store in self.stores.items()}

    def batches(self, start: int) -> Iterator[Batch]:
        """Batches start, start + 1, … without end, filling the stores where rows are missing.

        Whether a batch is read or computed is decided epoch by epoch, alike on all hosts.
        """
        while True:
            stop = self.pipeline.epoch_end(start)
            if all(store.complete_views().all() for store in self.stores.values()):
                stop = data.NO_END
            for local in self.pipeline.batches(start, stop):
                yield self._add_features(local)
            self.flush()
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("features are on disk")
            for store in self.stores.values():
                store.refresh()
            start = stop

    def flush(self) -> None:
        """Put the rows that were computed on disk."""
        for store in self.stores.values():
            store.flush()

    def needs_param(self, path: str) -> bool:
        """Not the parameters of a cached part."""
        return path.partition("/")[0] not in self.stores or not self.exp.model.in_frozen_prefix(
            path
        )

    def _add_features(self, local: data.NumpyBatch) -> Batch:
        put = self.exp.partitioner.put_batch
        missing = [t for t in self.stores if f"{t}_features" not in local]
        if missing:
            placed = put(local)
            local |= {f"{t}_features": self._compute_features(t, local, placed) for t in missing}
        if "image" in self.stores:
            local.pop("image", None)
        return put(local)

    def _compute_features(self, tower: str, local: data.NumpyBatch, placed: Batch) -> np.ndarray:
        """This host's rows, as they will be read from the store they go into."""
        store, views, good = self.stores[tower], local[f"{tower}_view"], local[f"{tower}_good"]
        if jax.process_count() == 1 and store.contains(views, local["index"]):
            return store.read(views, local["index"])[0]  # by calibration, or before a restart
        began = time.perf_counter()
        values = self.exp.partitioner.local_rows(self.prefix_fns[tower](placed))
        seconds = time.perf_counter() - began
        return store.write(views, local["index"], values, good, seconds=seconds)


def build_batch_source(
    exp: Experiment, locked: Params, pipeline: data.Pipeline
) -> CachedFeed | PlainFeed:
    """A `train.feed.MakeFeed`: with stores for what config.cache names and is locked."""
    found = open_stores(exp, locked, pipeline)
    if not found:
        return PlainFeed(pipeline, exp.partitioner)
    programs = {t: _compile_prefix(exp, locked, t) for t in found}
    return CachedFeed(dataclasses.replace(pipeline, stores=found), programs, exp)


def fill_cache(
    exp: Experiment, locked: Params, pipeline: data.Pipeline
) -> dict[str, data.FeatureStore]:
    """Fill the stores ahead of training, in source order; a second call goes on where one stopped.

    Raises ValueError when nothing can be cached.
    """
    ordered = build_batch_source(exp, locked, dataclasses.replace(pipeline, shuffle=False))
    if not isinstance(ordered, CachedFeed):
        raise ValueError(
            "nothing to cache: set config.cache.path, and lock a tower whose config.cache views "
            "are not 0"
        )
    for tower, store in ordered.stores.items():
        unused = {"tokenizer": None} if tower == "image" else {"transform": None}
        alone = dataclasses.replace(ordered.pipeline, stores={tower: store}, **unused)
        one = dataclasses.replace(ordered, pipeline=alone)
        total, size = store.views * store.num_records, one.pipeline.batch_size
        first = store.first_missing // size
        with tqdm(total=total, initial=first * size, unit="row", desc=f"locked {tower} tower") as b:
            for step, _ in zip(range(first, -(-total // size)), one.batches(first), strict=False):
                b.update(min(size, total - step * size))
        one.flush()
    return dict(ordered.stores)


def open_stores(
    exp: Experiment, locked: Params, pipeline: data.Pipeline
) -> dict[str, data.FeatureStore]:
    """The opened store of each tower that is to be cached and has a locked part."""
    c, out = exp.config.cache, {}
    if c.path is None:
        return out
    for tower, views in {"image": c.image_views, "text": c.text_views}.items():
        if views and exp.model.frozen_prefix(tower) is not None:
            parts = cache_key(exp, locked, tower, pipeline.source)
            shape = _feature_shape(exp, tower)
            name = _digest([parts, views, shape, c.dtype])
            path = cache_root(c.path) / f"{tower}-{name}"
            if not path.exists():
                _log_key_changes(path, parts)
            out[tower] = data.FeatureStore.open(
                path,
                views=views,
                num_records=len(pipeline.source),
                shape=shape,
                dtype=c.dtype,
                key=parts,
            )
    return out


def cache_root(path: str) -> Path:
    """The folder that `config.cache.path` means."""
    if path != "auto":
        return Path(path)
    base = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(base) / "imgtune_jax" / "features"


def cache_key(exp: Experiment, locked: Params, tower: str, source: data.Source) -> dict[str, Any]:
    """Everything that a cached value depends on, by name, ready for JSON."""
    c = exp.config
    prefix = exp.model.frozen_prefix(tower)
    assert prefix is not None, "only a frozen prefix is cached"
    parts: dict[str, Any] = {
        "weights": param_tree.params_digest(_front(exp, locked, tower)),
        "architecture": c.model[tower],
        "layers": prefix.num_layers,
        "compute_dtype": c.model.get("dtype"),
        "source": source.fingerprint,
    }
    if tower == "image":
        keys = ("image_size", "image_mean", "image_std")
        parts["normalisation"] = {k: v for k, v in c.model.items() if k in keys}
        parts["preprocess"] = c.data.transforms or c.preprocess
        parts["pixels"] = data.TRANSFORMS_VERSION
        parts["seed"] = c.seed if c.data.transforms else None  # preprocessing draws nothing
    else:
        parts["tokenizer"] = exp.tokenizer.fingerprint
        parts["captions"], parts["seed"] = c.data.caption_weights, c.seed
        if c.data.prefixes:
            parts["prefixes"] = c.data.prefixes
    return json.loads(json.dumps(parts))


def _log_key_changes(path: Path, parts: Mapping[str, Any]) -> None:
    """Name what is new about a key, against the store that resembles it most."""
    tower = path.name.partition("-")[0]
    old = [json.loads(p.read_text()) for p in path.parent.glob(f"{tower}-*/manifest.json")]
    changes = [differing_keys({k: m[k] for k in parts if k in m}, parts) for m in old]
    if changes:
        log.info("no cache of these features: new are %s", ", ".join(min(changes, key=len)))


def _compile_prefix(exp: Experiment, locked: Params, tower: str) -> Callable[[Batch], jax.Array]:
    run = jax.jit(
        functools.partial(exp.model.apply_frozen_prefix, tower=tower),
        out_shardings=exp.partitioner.batch_sharding,
    )
    params = _front(exp, locked, tower)
    return lambda batch: run(params, batch=batch)


def _front(exp: Experiment, locked: Params, tower: str) -> Params:
    return param_tree.select(
        locked, lambda p: p.startswith(f"{tower}/") and exp.model.in_frozen_prefix(p)
    )


def _feature_shape(exp: Experiment, tower: str) -> tuple[int, ...]:
    size, length = exp.config.model["image_size"], exp.tokenizer.length
    channels = len(exp.model.image_mean)

    def one_row(params: Params) -> jax.Array:
        batch = Batch(
            example_mask=jnp.ones(1, bool),
            image=jnp.zeros((1, size, size, channels), jnp.uint8),
            text=jnp.zeros((1, length), jnp.int32),
            text_mask=jnp.ones((1, length), bool),
        )
        return exp.model.apply_frozen_prefix(params, tower=tower, batch=batch)

    return jax.eval_shape(one_row, exp.abstract_params).shape[1:]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]
