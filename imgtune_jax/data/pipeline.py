"""Batches of records, loaded with Grain. A batch is a pure function of the config and the step.

The stream of records is a concatenation of epochs of the source. The order of a shuffled epoch
depends only on (seed, epoch). With batch size B, row j of batch t is position t·B + j of the
stream. Each host loads its slice of every batch. So a run can resume from its step alone, also with
another number of threads, worker processes or hosts. A bad record keeps its row, with zeros and
`example_mask` False.
"""

from __future__ import annotations

import collections
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import grain
import numpy as np
from absl import flags

from imgtune_jax.data import image as image_lib
from imgtune_jax.data.caption_sampler import CaptionSampler
from imgtune_jax.data.feature_store import FeatureStore
from imgtune_jax.data.record import BadRecordCounter, Fault, Source
from imgtune_jax.data.rows import PADDING_INDEX, Collator, RowBuilder
from imgtune_jax.data.tokenizer import Tokenizer
from imgtune_jax.data.transforms import Compose, output_shape
from imgtune_jax.errors import UserError

NumpyBatch = dict[str, np.ndarray]
NO_END = 1 << 40  # a number of batches that no run reaches
MAX_CHECKED_RECORDS = 1000  # a check reads at most so many records to find a usable one


@dataclass(frozen=True, kw_only=True, eq=False)
class Pipeline:
    """Batches of a source for this host, as dicts of NumPy arrays.

    A batch has `example_mask` bool[b] and the record's `index` i64[b] (-1 for padding). With a
    transform, it has `image` u8[b h w 3]. With a tokenizer, it has `text` i32[b l], `text_mask` and
    `target_mask` bool[b l] and, if the source has groups, `group` i32[b]. `caption_weights`,
    `templates` and `prefixes` are passed to CaptionSampler.

    `stores` maps a modality ("image", "text") to the store of its cached features. A store has a
    fixed number of views. Epoch e uses view v = e % views, and samples the same augmentations (or
    captions) as epoch v. If the store has all rows of a batch's views, the batch has
    `image_features` f32[b …] instead of `image` (no image is decoded), or `text_features` f32[b …]
    in addition to `text`. If not, the caller is to compute and store them: the batch has
    `image_view` or `text_view` i64[b], and `image_good` or `text_good` bool[b], which is False for
    bad records. The pipeline reads which views are complete when iteration begins.

    With `num_workers` = 0, `num_threads` threads read max(prefetch, num_threads) batches ahead.
    Otherwise, each worker process has `num_threads` threads and holds at most
    num_threads + 2 ceil(prefetch / num_workers) + 2 batches.

    `counted` has the counts of bad records, as `bad_records` returns them, of an earlier process of
    the run. Counting continues from them.

    Raises UserError if the fields contradict each other or the source.
    """

    source: Source
    batch_size: int  # of all hosts
    transform: Compose | None = None
    tokenizer: Tokenizer | None = None
    caption_weights: Mapping[str, float] = field(default_factory=dict)
    templates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prefixes: Mapping[str, str] = field(default_factory=dict)
    length_buckets: tuple[int, ...] = ()
    seed: int = 0
    shuffle: bool = False
    rows: tuple[int, ...] | None = None  # the rows of a batch that this host has; None: all
    num_threads: int = 4
    num_workers: int = 0
    prefetch: int = 4
    max_bad_fraction: float = 0.1
    max_bad_fraction_after: int = 1000
    max_pixels: int = image_lib.MAX_PIXELS
    background: image_lib.Color = image_lib.WHITE
    stores: Mapping[str, FeatureStore] = field(default_factory=dict, repr=False)
    counted: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.source)
        if n == 0:
            raise UserError("the source has no records; expected at least one")
        if self.batch_size < 1:
            raise UserError(f"batch_size = {self.batch_size}; expected 1 or more")
        rows = self.local_rows
        if not rows or [*rows] != sorted({*rows}) or not 0 <= rows[0] <= rows[-1] < self.batch_size:
            raise UserError(
                f"rows = {reprlib.repr(rows)}; expected increasing numbers from 0 to "
                f"{self.batch_size - 1}"
            )
        for modality, store in self.stores.items():
            if store.num_records != n:
                raise UserError(
                    f"the store has {modality} features of {store.num_records} records, but the "
                    f"source has {n} records; compute the features from this source"
                )
        self._check_buckets()
        if self.caption_sampler is not None:
            known = getattr(self.source, "caption_sets", tuple(self.caption_weights))
            self.caption_sampler.check(known)

    def _check_buckets(self) -> None:
        buckets = self.length_buckets
        if not buckets:
            return
        length = self.tokenizer.length if self.tokenizer else 0
        if list(buckets) != sorted({*buckets}) or not 0 < buckets[0] <= buckets[-1] < length:
            raise UserError(
                f"length_buckets = {buckets}; expected increasing lengths of at least 1, all below "
                f"the tokenizer's length, {length}"
            )
        if len(self.local_rows) < self.batch_size:
            raise UserError(
                f"length_buckets = {buckets} with several hosts: each host knows only its own "
                "texts, so the hosts would not agree on a length; set length_buckets=() and a "
                "smaller tokenizer.length"
            )
        if "text" in self.stores:
            raise UserError(
                f"length_buckets = {buckets} with cached text features, which all have the "
                "same length; set length_buckets=() or cache.text_views=0"
            )

    @cached_property
    def caption_sampler(self) -> CaptionSampler | None:
        """The sampler of captions, or None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return CaptionSampler(self.caption_weights, self.templates, self.prefixes)

    @property
    def has_group(self) -> bool:
        """Whether batches have groups."""
        return self.tokenizer is not None and getattr(self.source, "has_group", False)

    @property
    def local_batch_size(self) -> int:
        """Number of rows of a batch on this host."""
        return len(self.local_rows)

    @cached_property
    def local_rows(self) -> Sequence[int]:
        """The rows of a batch that this host has, increasing."""
        return range(self.batch_size) if self.rows is None else self.rows

    @cached_property
    def _counter(self) -> BadRecordCounter:
        # After an epoch, the fraction is exact, however few records the source has.
        after = min(self.max_bad_fraction_after, len(self.source))
        return BadRecordCounter.from_summary(self.counted, self.max_bad_fraction, after)

    def bad_records(self) -> dict[str, int]:
        """Return {"seen": number of records so far, cause: number of bad ones, …} on this host."""
        return self._counter.summary()

    def epoch_end(self, step: int) -> int:
        """Return the index of the first batch that begins in a later epoch than batch `step`."""
        n = len(self.source)
        return -(-(step * self.batch_size // n + 1) * n // self.batch_size)

    def batches(self, start: int = 0, stop: int = NO_END) -> Iterator[NumpyBatch]:
        """Yield the batches start, start + 1, …, stop - 1.

        Raises TooManyBadRecordsError if the fraction of bad records exceeds `max_bad_fraction`.
        """
        return self._iterate(start, stop, one_pass=False)

    def one_pass(self) -> Iterator[NumpyBatch]:
        """Yield every record once, in the order of the source, with the last batch padded.

        Captions are not sampled: each is the first one of the set with the largest weight.
        Random transforms sample as in epoch 0, so use deterministic ones for evaluation. Feature
        stores and length buckets are not used.
        """
        return self._iterate(0, -(-len(self.source) // self.batch_size), one_pass=True)

    def row_builder(self, *, one_pass: bool = False) -> RowBuilder:
        """Return the function from a position in this host's part of the stream to its row."""
        stores = {} if one_pass else self.stores
        complete_views = {
            modality: tuple(store.complete_views()) for modality, store in stores.items()
        }
        return RowBuilder(self, one_pass, complete_views)

    def collator(self, *, one_pass: bool = False) -> Collator:
        """Return the function from the rows of a batch to the batch.

        Raises UserError if the shape of the transformed images depends on the image.
        """
        image_shape = None if self.transform is None else output_shape(self.transform)
        return Collator(self, one_pass, image_shape)

    def check_records(self) -> None:
        """Check that training can use a record, and that it can be tokenized.

        Reads records in the order of training until one is usable. Raises UserError if none of the
        first MAX_CHECKED_RECORDS is.
        """
        build_row, faults = self.row_builder(), []
        for position in range(min(len(self.source), MAX_CHECKED_RECORDS)):
            row = build_row(position)
            if row["fault"] is None:
                self.collator()([row])
                return
            faults.append(row["fault"])
        causes = collections.Counter(fault.cause for fault in faults)
        raise UserError(
            f"none of the first {len(faults)} records can be used: "
            f"{', '.join(f'{n} {cause}' for cause, n in causes.items())}; "
            f"for example {faults[0].key}: {faults[0].detail}; correct config.data, or the files"
        )

    def _iterate(self, start: int, stop: int, *, one_pass: bool) -> Iterator[NumpyBatch]:
        size = self.local_batch_size
        build_row, collate = self.row_builder(one_pass=one_pass), self.collator(one_pass=one_pass)
        dataset = grain.MapDataset.range(start * size, stop * size).map(build_row)
        batched = dataset.batch(size, drop_remainder=True, batch_fn=collate)
        iterator = iter(self._parallelize(batched))
        try:
            for _ in range(start, stop):
                yield self._count_faults(next(iterator))
        finally:
            iterator.close()

    def _parallelize(self, batches: grain.MapDataset) -> grain.IterDataset:
        workers, threads = self.num_workers, self.num_threads
        thread_buffer = threads if workers else max(self.prefetch, threads)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=thread_buffer)
        dataset = batches.to_iter_dataset(options)
        if not workers:
            return dataset
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain passes parsed absl flags on to workers
        worker_buffer = max(1, -(-self.prefetch // workers))
        return dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=worker_buffer)
        )

    def _count_faults(self, loaded: dict[str, Any]) -> NumpyBatch:
        """Count the bad records of a batch, in the main process, and return its arrays."""
        faults: tuple[Fault, ...] = loaded.pop("faults").faults
        batch: NumpyBatch = {name: np.asarray(array) for name, array in loaded.items()}
        self._counter.add(int((batch["index"] != PADDING_INDEX).sum()), faults)
        return batch
