"""Records -> batches, on Grain. Position is one integer.

Batch t of a run is a pure function of (config, t). Its row j is position p = t·B + j of a stream
that is epoch after epoch of the source, each shuffled by (seed, epoch); a host takes its slice of
every batch. So a resumed run needs no state but its step, and threads, worker processes and hosts
may change in number. A broken record keeps its row, with zeros and `example_mask` False.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Bool, Float

from imgtune_jax.data import image as image_lib
from imgtune_jax.data.captions import CaptionDraw
from imgtune_jax.data.record import (
    BadRecord,
    BadRecordCounter,
    Cause,
    Fault,
    Record,
    Source,
    describe,
)
from imgtune_jax.data.text import Tokenizer
from imgtune_jax.data.transforms import Transform

NumpyBatch = dict[str, np.ndarray]
CAPTION_STREAM, IMAGE_STREAM = 0, 1  # apart, so a run without decoding draws the same captions
ENDLESS = 1 << 40  # batches; more than a run takes
PADDING = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Pipeline:
    """Batches as dicts of NumPy arrays, for this host.

    image u8[b h w 3] if there is a transform; text i32[b l] and text_mask bool[b l] if there is a
    tokenizer, with group i32[b] if the source has groups; always example_mask bool[b] and index
    i64[b] (-1 is padding). `captions` weighs caption sets, `templates` gives prompts to a set.

    features f32[views n d] and valid bool[n] replace decoding: no image is opened, and the batch
    has image_features f32[b d], view epoch % views of each record.

    Raises ValueError when fields do not fit each other or the source.
    """

    source: Source
    batch_size: int
    transform: Transform | None = None
    tokenizer: Tokenizer | None = None
    captions: Mapping[str, float] = field(default_factory=dict)
    templates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    seed: int = 0
    shuffle: bool = False
    host_index: int = 0
    host_count: int = 1
    num_threads: int = 4
    num_workers: int = 0
    prefetch: int = 4
    max_bad_fraction: float = 0.1
    min_records: int = 1000
    max_pixels: int = image_lib.MAX_PIXELS
    background: tuple[int, int, int] = image_lib.WHITE
    features: Float[np.ndarray, "views n d"] | None = field(default=None, repr=False)
    valid: Bool[np.ndarray, " n"] | None = field(default=None, repr=False)

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
        if self.features is not None and self.features.shape[1] != n:
            raise ValueError(
                f"features {self.features.shape} are of {self.features.shape[1]} records, and the "
                f"source has {n}; compute them from this source"
            )
        if self.valid is not None and self.valid.shape != (n,):
            raise ValueError(f"valid {self.valid.shape}; wanted one entry for {n} records")
        if self.tokenizer is not None:
            CaptionDraw(self.captions, self.templates).check(
                getattr(self.source, "caption_sets", tuple(self.captions))
            )

    @classmethod
    def for_views(cls, *, source: Source, transform: Transform, **fields: Any) -> Pipeline:
        """Images alone, in source order, epoch after epoch: what a feature cache is made from.

        Record i of pass v is augmented exactly as epoch v of a shuffled run augments it.
        """
        return cls(source=source, transform=transform, shuffle=False, **fields)

    @cached_property
    def _counter(self) -> BadRecordCounter:
        return BadRecordCounter(self.max_bad_fraction, self.min_records)

    def bad_records(self) -> dict[str, int]:
        """{"seen": records so far, cause: broken ones, …} of this host, ready for JSON."""
        return self._counter.summary()

    def epoch_of(self, step: int) -> int:
        """The epoch that batch `step` begins in."""
        return step * self.batch_size // len(self.source)

    def batches(self, start: int = 0) -> Iterator[NumpyBatch]:
        """Batches start, start + 1, … without end. Raises TooManyBadRecords past the cap."""
        return self._run(self._rows(deterministic=False), start, ENDLESS)

    def one_pass(self) -> Iterator[NumpyBatch]:
        """Every record once, in source order; the last batch is padded.

        Captions are the first alternative of the heaviest set. A random transform draws as in
        epoch 0, so use a deterministic one to evaluate.
        """
        return self._run(self._rows(deterministic=True), 0, -(-len(self.source) // self.batch_size))

    def _rows(self, *, deterministic: bool) -> _Rows:
        with_image = self.features is None and self.transform is not None
        return _Rows(
            source=self.source,
            transform=self.transform if with_image else None,
            captions=CaptionDraw(self.captions, self.templates) if self.tokenizer else None,
            with_group=self.tokenizer is not None and getattr(self.source, "has_group", False),
            seed=self.seed,
            shuffle=self.shuffle and not deterministic,
            one_pass=deterministic,
            max_pixels=self.max_pixels,
            background=self.background,
            batch_size=self.batch_size,
            host_index=self.host_index,
            host_count=self.host_count,
        )

    def _run(self, rows: _Rows, start: int, stop: int) -> Iterator[NumpyBatch]:
        local = self.batch_size // self.host_count
        collate = _Collate(self.tokenizer, rows.with_group, rows.shape())
        dataset = grain.MapDataset.range(start * local, stop * local).map(rows)
        batched = dataset.batch(local, drop_remainder=True, batch_fn=collate)
        iterator = iter(self._parallel(batched))
        try:
            for step in range(start, stop):
                yield self._finish(next(iterator), rows, step)
        finally:
            iterator.close()

    def _parallel(self, batches: grain.MapDataset) -> grain.IterDataset:
        options = grain.ReadOptions(
            num_threads=self.num_threads,
            prefetch_buffer_size=max(self.prefetch, self.num_threads),
        )
        dataset = batches.to_iter_dataset(options)
        if not self.num_workers:
            return dataset
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain passes its flags on to workers
        return dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=self.num_workers, per_worker_buffer_size=max(1, self.prefetch)
            )
        )

    def _finish(self, loaded: dict[str, Any], rows: _Rows, step: int) -> NumpyBatch:
        """In the main process: count what was broken, and put cached features in."""
        faults: list[Fault] = list(loaded.pop("faults").faults)
        keys = loaded.pop("keys").keys
        batch: NumpyBatch = {k: np.asarray(v) for k, v in loaded.items()}
        real = batch["index"] != PADDING
        if self.features is not None:
            faults += self._put_features(batch, rows, step, keys)
        self._counter.add(int(real.sum()), faults)
        return batch

    def _put_features(
        self, batch: NumpyBatch, rows: _Rows, step: int, keys: Sequence[str]
    ) -> list[Fault]:
        assert self.features is not None
        local = len(batch["index"])
        epochs = [rows.locate(step * local + j)[0] for j in range(local)]
        views = np.array(epochs) % len(self.features)
        usable = batch["example_mask"]
        if self.valid is not None:
            usable = usable & self.valid[batch["index"]]
        faults = [
            Fault(keys[j], Cause.INVALID_FEATURES, "its image could not be read when cached")
            for j in np.flatnonzero(batch["example_mask"] & ~usable).tolist()
        ]
        found = np.zeros((local, self.features.shape[2]), np.float32)
        found[usable] = self.features[views[usable], batch["index"][usable]]
        for name in ("text", "text_mask"):
            if name in batch:
                batch[name] = np.where(usable[:, None], batch[name], 0).astype(batch[name].dtype)
        batch.update(image_features=found, example_mask=usable)
        return faults


@dataclass(frozen=True)
class _Rows:
    """Local stream position -> one row. Pure, and what worker processes run."""

    source: Source
    transform: Transform | None
    captions: CaptionDraw | None
    with_group: bool
    seed: int
    shuffle: bool
    one_pass: bool
    max_pixels: int
    background: tuple[int, int, int]
    batch_size: int
    host_index: int
    host_count: int

    @cached_property
    def _order(self) -> grain.MapDataset:
        # Grain derives an epoch's order from seed + epoch: a digest keeps runs of neighbouring
        # seeds from sharing each other's epochs.
        seed = int.from_bytes(hashlib.sha256(f"order {self.seed}".encode()).digest()[:4])
        return grain.MapDataset.range(len(self.source)).shuffle(seed=seed)

    def _shuffled(self, position: int) -> int:
        index: Any = self._order[position]
        return int(index)

    def locate(self, local: int) -> tuple[int, int]:
        """(epoch, record) of a position of this host's stream; the record -1 is padding."""
        size = self.batch_size // self.host_count
        step, row = divmod(local, size)
        position = step * self.batch_size + self.host_index * size + row
        epoch, index = divmod(position, len(self.source))
        if self.one_pass and epoch:
            return 0, PADDING
        return epoch, self._shuffled(position) if self.shuffle else index

    def __call__(self, local: int) -> dict[str, Any]:
        epoch, index = self.locate(int(local))
        row: dict[str, Any] = {"index": index, "key": "", "fault": None}
        if index == PADDING:
            return row
        record = describe(self.source, index) if self.transform is None else self.source[index]
        row["key"] = record.key
        try:
            row.update(self._use(record, epoch, index))
        except BadRecord as bad:
            row["fault"] = Fault(record.key, bad.cause, bad.detail)
        return row

    def _use(self, record: Record, epoch: int, index: int) -> dict[str, Any]:
        values: dict[str, Any] = {"good": True}
        if self.captions is not None:
            rng = np.random.default_rng((self.seed, epoch, index, CAPTION_STREAM))
            draw = self.captions
            values["caption"] = draw.first(record) if self.one_pass else draw(record, rng)
            if self.with_group:
                record.check("group")
                values["group"] = record.group
        if self.transform is not None:
            record.check("image")
            picture = image_lib.decode(
                record.image, max_pixels=self.max_pixels, background=self.background
            )
            rng = np.random.default_rng((self.seed, epoch, index, IMAGE_STREAM))
            values["image"] = self.transform(picture, rng)
        return values

    def shape(self) -> tuple[int, ...] | None:
        """The pictures' shape, found on two blank ones.

        Raises ValueError when the transforms leave it to the picture.
        """
        if self.transform is None:
            return None
        blank = np.zeros((48, 64, 3), np.uint8), np.zeros((80, 40, 3), np.uint8)
        first, second = (self.transform(b, np.random.default_rng(0)).shape for b in blank)
        if first != second:
            raise ValueError(
                f"the transforms give pictures of different sizes ({first}, {second}); end them "
                "with a resize (squash or longest) or a crop"
            )
        return first


@dataclass(frozen=True)
class _Faults:
    """One leaf to Grain, whatever it holds."""

    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class _Keys:
    """One leaf to Grain, whatever it holds."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class _Collate:
    """Rows -> batch. Texts are tokenized together."""

    tokenizer: Tokenizer | None
    with_group: bool
    shape: tuple[int, ...] | None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        good = np.array(["good" in row for row in rows])
        batch: dict[str, Any] = {
            "example_mask": good,
            "index": np.array([row["index"] for row in rows], np.int64),
            "faults": _Faults(tuple(row["fault"] for row in rows if row["fault"] is not None)),
            "keys": _Keys(tuple(row["key"] for row in rows)),
        }
        if self.shape is not None:
            blank = np.zeros(self.shape, np.uint8)
            batch["image"] = np.stack([row.get("image", blank) for row in rows])
        if self.tokenizer is not None:
            ids, mask = self.tokenizer([row.get("caption", "") for row in rows])
            batch["text"] = np.where(good[:, None], ids, 0).astype(np.int32)
            batch["text_mask"] = mask & good[:, None]
        if self.with_group:
            batch["group"] = np.array([row.get("group", -1) for row in rows], np.int32)
        return batch
