"""Batches on the device mesh, with cached features if the run has a feature cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

from imgtune_jax import data
from imgtune_jax.training.experiment import Experiment
from imgtune_jax.types import Batch


@dataclass(frozen=True)
class BatchSource:
    """The training batches of an experiment. Batch t is a pure function of the config and t.

    For each tower in `pipeline.stores`, batches contain the output of the tower's frozen prefix, as
    `image_features` or `text_features`. The rows are read from the store, or computed by
    `prefix_fns[tower]` and added to the store. Without stores, batches are those of the pipeline.
    """

    experiment: Experiment
    pipeline: data.Pipeline
    prefix_fns: Mapping[str, Callable[[Batch], jax.Array]]  # global batch -> f32[b …]

    @property
    def stores(self) -> Mapping[str, data.FeatureStore]:
        """The stores, by tower; empty without a feature cache."""
        return self.pipeline.stores

    @property
    def store_paths(self) -> dict[str, str]:
        """The folders of the stores, by tower."""
        return {tower: str(store.folder.absolute()) for tower, store in self.stores.items()}

    def batches(self, start: int) -> Iterator[Batch]:
        """Yield batches start, start + 1, … without end, and fill the stores if rows are missing.

        Between epochs, the hosts synchronize, look for new rows on disk, and decide whether the
        next epoch reads or computes features. So all hosts decide the same.
        """
        while True:
            stop = self.pipeline.epoch_end(start)
            if all(store.complete_views().all() for store in self.stores.values()):
                stop = data.NO_END
            for local_batch in self.pipeline.batches(start, stop):
                yield self._add_features(local_batch)
            self.flush()
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("features are on disk")
            for store in self.stores.values():
                store.refresh()
            start = stop

    def flush(self) -> None:
        """Write the computed rows to disk. Call it before a checkpoint is saved."""
        for store in self.stores.values():
            store.flush()

    def needs_param(self, path: str) -> bool:
        """Whether the step reads this parameter; it reads none of a cached frozen prefix."""
        is_cached = path.partition("/")[0] in self.stores
        return not (is_cached and self.experiment.model.in_frozen_prefix(path))

    def _add_features(self, local_batch: data.NumpyBatch) -> Batch:
        """Put this host's rows on the mesh, with the features of every tower that has a store."""
        put_batch = self.experiment.partitioner.put_batch
        missing = [t for t in self.stores if f"{t}_features" not in local_batch]
        if missing:
            batch = put_batch(local_batch)
            local_batch |= {
                f"{t}_features": self._compute_features(t, local_batch, batch) for t in missing
            }
        if "image" in self.stores:
            local_batch.pop("image", None)
        return put_batch(local_batch)

    def _compute_features(
        self, tower: str, local_batch: data.NumpyBatch, batch: Batch
    ) -> np.ndarray:
        """Compute and store this host's rows; return them, rounded to the store's dtype."""
        store, indices = self.stores[tower], local_batch["index"]
        views, valid = local_batch[f"{tower}_view"], local_batch[f"{tower}_good"]
        if jax.process_count() == 1 and store.contains(views, indices):
            # Calibration, or this run before it was interrupted, has already computed these rows.
            return store.read(views, indices)[0]
        start_time = time.perf_counter()
        values = self.experiment.partitioner.local_rows(self.prefix_fns[tower](batch))
        seconds = time.perf_counter() - start_time
        written = self.experiment.partitioner.written_rows(len(valid))
        return store.write(views, indices, values, valid, written=written, seconds=seconds)
