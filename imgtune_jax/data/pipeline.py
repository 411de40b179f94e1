"""Records -> batches, on Grain. Position is one integer.

Batch t of a run is a pure function of (config, t). Its row j is position p = t·B + j of a stream
that is epoch after epoch of the source, each shuffled by (seed, epoch); a host takes its slice of
every batch. So a resumed run needs no state but its step, and threads, worker processes and hosts
may change in number. A broken record keeps its row, with zeros and `example_mask` False.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import grain
import numpy as np
from absl import flags

from imgtune_jax.data import image as image_lib
from imgtune_jax.data.caption_sampler import CaptionSampler
from imgtune_jax.data.feature_store import FeatureStore
from imgtune_jax.data.record import (
    BadRecordCounter,
    Fault,
    Source,
)
from imgtune_jax.data.rows import PADDING_INDEX, Collator, RowBuilder
from imgtune_jax.data.tokenizer import Tokenizer
from imgtune_jax.data.transforms import Compose

NumpyBatch = dict[str, np.ndarray]
NO_END = 1 << 40  # batches; more than a run takes


@dataclass(frozen=True, kw_only=True, eq=False)
class Pipeline:
    """Batches as dicts of NumPy arrays, for this host.

    image u8[b h w 3] if there is a transform; text i32[b l], text_mask and target_mask bool[b l] if
    there is a tokenizer, with group i32[b] if the source has groups; always example_mask bool[b]
    and index i64[b] (-1 is padding). `captions` weighs caption sets; `templates` and `prefixes` as
    in CaptionDraw.

    `stores` of features, by tower ("image", "text"), replace what the towers read: a batch whose
    rows a store holds has image_features or text_features f32[b …] in the place of its image (none
    is opened), or beside its text. With a store, a record is augmented, or its caption drawn, as
    in epoch `view` = epoch % views, and image_good and text_good bool[b] say which rows to store.
    What a store holds is read once, when iteration begins.

    `num_threads` read `prefetch` batches ahead. With `num_workers` processes, each has so many
    threads, and they hold at most num_threads + 2 ceil(prefetch / num_workers) + 2 batches each.

    Raises ValueError when fields do not fit each other or the source.
    """

    source: Source
    batch_size: int
    transform: Compose | None = None
    tokenizer: Tokenizer | None = None
    captions: Mapping[str, float] = field(default_factory=dict)
    templates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prefixes: Mapping[str, str] = field(default_factory=dict)
    length_buckets: tuple[int, ...] = ()
    seed: int = 0
    shuffle: bool = False
    host_index: int = 0
    host_count: int = 1
    num_threads: int = 4
    num_workers: int = 0
    prefetch: int = 4
    max_bad_fraction: float = 0.1
    max_bad_fraction_after: int = 1000
    max_pixels: int = image_lib.MAX_PIXELS
    background: tuple[int, int, int] = image_lib.WHITE
    stores: Mapping[str, FeatureStore] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        n = len(self.source)
        if n == 0:
            raise ValueError("the source is empty")
        if self.batch_size < 1 or self.batch_size % self.host_count:
            raise ValueError(
                f"batch {self.batch_size} does not divide over {self.host_count} hosts; "
                f"{max(1, self.batch_size // self.host_count) * self.host_count} would"
            )
        if not 0 <= self.host_index < self.host_count:
            raise ValueError(f"host_index = {self.host_index} of host_count = {self.host_count}")
        for tower, store in self.stores.items():
            if store.num_records != n:
                raise ValueError(
                    f"{tower} features of {store.num_records} records, and the source has {n}; compute them "
                    "from this source"
                )
        self._check_buckets()
        if self.tokenizer is not None:
            self._caption_sampler().check(
                getattr(self.source, "caption_sets", tuple(self.captions))
            )

    def _check_buckets(self) -> None:
        buckets = self.length_buckets
        if not buckets:
            return
        longest = self.tokenizer.length if self.tokenizer else 0
        if list(buckets) != sorted({*buckets}) or not 0 < buckets[0] <= buckets[-1] < longest:
            raise ValueError(
                f"length_buckets = {buckets}; wanted rising lengths of at least 1, all below the "
                f"tokenizer's, {longest}"
            )
        if self.host_count > 1:
            raise ValueError(
                "length_buckets on several hosts: each sees its own texts only, and they would not "
                "agree on a length; set length_buckets=() and a shorter tokenizer.length"
            )
        if "text" in self.stores:
            raise ValueError(
                "length_buckets with a text tower's cache, whose rows have one length; set "
                "length_buckets=() or cache.text_views=0"
            )

    @cached_property
    def _counter(self) -> BadRecordCounter:
        return BadRecordCounter(self.max_bad_fraction, self.max_bad_fraction_after)

    def _caption_sampler(self) -> CaptionSampler:
        return CaptionSampler(self.captions, self.templates, self.prefixes)

    def bad_records(self) -> dict[str, int]:
        """{"seen": records so far, cause: broken ones, …} of this host, ready for JSON."""
        return self._counter.summary()

    def epoch_end(self, step: int) -> int:
        """The first batch that holds nothing of the epoch in which batch `step` begins."""
        n = len(self.source)
        return -(-(step * self.batch_size // n + 1) * n // self.batch_size)

    def batches(self, start: int = 0, stop: int = NO_END) -> Iterator[NumpyBatch]:
        """Batches start, start + 1, … until `stop`. Raises TooManyBadRecords past the cap."""
        return self._run(self.row_builder(deterministic=False), start, stop)

    def one_pass(self) -> Iterator[NumpyBatch]:
        """Every record once, in source order; the last batch is padded.

        Captions are the first alternative of the heaviest set. A random transform draws as in
        epoch 0, so use a deterministic one to evaluate.
        """
        return self._run(
            self.row_builder(deterministic=True), 0, -(-len(self.source) // self.batch_size)
        )

    def row_builder(self, *, deterministic: bool = False) -> RowBuilder:
        """What makes a row of a position of the stream; `deterministic` as `one_pass` needs it."""
        stores = {} if deterministic else self.stores
        return RowBuilder(
            source=self.source,
            transform=self.transform,
            captions=self._caption_sampler() if self.tokenizer else None,
            with_group=self.tokenizer is not None and getattr(self.source, "has_group", False),
            seed=self.seed,
            shuffle=self.shuffle and not deterministic,
            one_pass=deterministic,
            max_pixels=self.max_pixels,
            background=self.background,
            batch_size=self.batch_size,
            host_index=self.host_index,
            host_count=self.host_count,
            views={tower: store.views for tower, store in stores.items()},
            complete={tower: tuple(store.complete_views()) for tower, store in stores.items()},
        )

    def collator(self, rows: RowBuilder) -> Collator:
        """What makes a batch of what `rows` gives."""
        stores = self.stores if rows.views else {}
        buckets = () if rows.one_pass else self.length_buckets
        return Collator(self.tokenizer, rows.with_group, rows.shape(), stores, buckets)

    def _run(self, rows: RowBuilder, start: int, stop: int) -> Iterator[NumpyBatch]:
        local = self.batch_size // self.host_count
        collate = self.collator(rows)
        dataset = grain.MapDataset.range(start * local, stop * local).map(rows)
        batched = dataset.batch(local, drop_remainder=True, batch_fn=collate)
        iterator = iter(self._parallel(batched))
        try:
            for _ in range(start, stop):
                yield self._count_faults(next(iterator))
        finally:
            iterator.close()

    def _parallel(self, batches: grain.MapDataset) -> grain.IterDataset:
        workers, threads = self.num_workers, self.num_threads
        ahead = threads if workers else max(self.prefetch, threads)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        dataset = batches.to_iter_dataset(options)
        if not workers:
            return dataset
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain passes its flags on to workers
        each = max(1, -(-self.prefetch // workers))
        return dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=each)
        )

    def _count_faults(self, loaded: dict[str, Any]) -> NumpyBatch:
        """In the main process: count what was broken."""
        faults: tuple[Fault, ...] = loaded.pop("faults").faults
        batch: NumpyBatch = {k: np.asarray(v) for k, v in loaded.items()}
        self._counter.add(int((batch["index"] != PADDING_INDEX).sum()), faults)
        return batch
