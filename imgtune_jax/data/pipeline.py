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

from imgtune_jax.data import image as image_lib
from imgtune_jax.data.captions import Caption, CaptionDraw
from imgtune_jax.data.record import (
    BadRecord,
    BadRecordCounter,
    Cause,
    Fault,
    Record,
    Source,
    describe,
)
from imgtune_jax.data.store import FeatureStore
from imgtune_jax.data.text import Tokenizer
from imgtune_jax.data.transforms import Compose

NumpyBatch = dict[str, np.ndarray]
CAPTION_STREAM, IMAGE_STREAM = 0, 1  # apart, so a run without decoding draws the same captions
ENDLESS = 1 << 40  # batches; more than a run takes
PADDING = -1


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

    Raises ValueError when fields do not fit each other or the source.
    """

    source: Source
    batch_size: int
    transform: Compose | None = None
    tokenizer: Tokenizer | None = None
    captions: Mapping[str, float] = field(default_factory=dict)
    templates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prefixes: Mapping[str, str] = field(default_factory=dict)
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
            if store.n != n:
                raise ValueError(
                    f"{tower} features of {store.n} records, and the source has {n}; compute them "
                    "from this source"
                )
        if self.tokenizer is not None:
            self._draw().check(getattr(self.source, "caption_sets", tuple(self.captions)))

    @cached_property
    def _counter(self) -> BadRecordCounter:
        return BadRecordCounter(self.max_bad_fraction, self.min_records)

    def _draw(self) -> CaptionDraw:
        return CaptionDraw(self.captions, self.templates, self.prefixes)

    def bad_records(self) -> dict[str, int]:
        """{"seen": records so far, cause: broken ones, …} of this host, ready for JSON."""
        return self._counter.summary()

    def epoch_end(self, step: int) -> int:
        """The first batch that holds nothing of the epoch in which batch `step` begins."""
        n = len(self.source)
        return -(-(step * self.batch_size // n + 1) * n // self.batch_size)

    def batches(self, start: int = 0, stop: int = ENDLESS) -> Iterator[NumpyBatch]:
        """Batches start, start + 1, … until `stop`. Raises TooManyBadRecords past the cap."""
        return self._run(self._rows(deterministic=False), start, stop)

    def one_pass(self) -> Iterator[NumpyBatch]:
        """Every record once, in source order; the last batch is padded.

        Captions are the first alternative of the heaviest set. A random transform draws as in
        epoch 0, so use a deterministic one to evaluate.
        """
        return self._run(self._rows(deterministic=True), 0, -(-len(self.source) // self.batch_size))

    def _rows(self, *, deterministic: bool) -> _Rows:
        stores = {} if deterministic else self.stores
        return _Rows(
            source=self.source,
            transform=self.transform,
            captions=self._draw() if self.tokenizer else None,
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
            complete={tower: tuple(store.complete()) for tower, store in stores.items()},
        )

    def _run(self, rows: _Rows, start: int, stop: int) -> Iterator[NumpyBatch]:
        local = self.batch_size // self.host_count
        collate = _Collate(
            self.tokenizer, rows.with_group, rows.shape(), self.stores if rows.views else {}
        )
        dataset = grain.MapDataset.range(start * local, stop * local).map(rows)
        batched = dataset.batch(local, drop_remainder=True, batch_fn=collate)
        iterator = iter(self._parallel(batched))
        try:
            for _ in range(start, stop):
                yield self._finish(next(iterator))
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

    def _finish(self, loaded: dict[str, Any]) -> NumpyBatch:
        """In the main process: count what was broken."""
        faults: tuple[Fault, ...] = loaded.pop("faults").faults
        batch: NumpyBatch = {k: np.asarray(v) for k, v in loaded.items()}
        self._counter.add(int((batch["index"] != PADDING).sum()), faults)
        return batch


@dataclass(frozen=True)
class _Rows:
    """Local stream position -> one row. Pure, and what worker processes run."""

    source: Source
    transform: Compose | None
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
    views: Mapping[str, int]
    complete: Mapping[str, tuple[bool, ...]]

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

    def reads(self, tower: str, local: int) -> bool:
        """Does a position's whole batch, on all hosts, find its features in the store?"""
        if tower not in self.views:
            return False
        first = local // (self.batch_size // self.host_count) * self.batch_size
        epochs = {p // len(self.source) for p in (first, first + self.batch_size - 1)}
        return all(self.complete[tower][epoch % self.views[tower]] for epoch in epochs)

    def __call__(self, local: int) -> dict[str, Any]:
        epoch, index = self.locate(int(local))
        row: dict[str, Any] = {"index": index, "key": "", "fault": None, "epoch": epoch}
        row["reads"] = [t for t in self.views if self.reads(t, int(local))]
        if index == PADDING:
            return row
        with_image = self.transform is not None and "image" not in row["reads"]
        record = self.source[index] if with_image else describe(self.source, index)
        row["key"] = record.key
        parts: dict[str, Any] = {} if self.captions is None else {"text": self._text}
        parts |= {"image": self._image} if with_image else {}
        for tower, part in parts.items():  # both, even if one is broken: each has its own store
            drawn = epoch % self.views[tower] if tower in self.views else epoch
            try:
                row.update(part(record, drawn, index))
                row[f"{tower}_good"] = True
            except BadRecord as bad:
                row["fault"] = row["fault"] or Fault(record.key, bad.cause, bad.detail)
        if row["fault"] is None:
            row["good"] = True
        return row

    def _text(self, record: Record, epoch: int, index: int) -> dict[str, Any]:
        assert self.captions is not None
        rng = np.random.default_rng((self.seed, epoch, index, CAPTION_STREAM))
        draw = self.captions
        values: dict[str, Any] = {
            "caption": draw.first(record) if self.one_pass else draw(record, rng)
        }
        if self.with_group:
            record.check("group")
            values["group"] = record.group
        return values

    def _image(self, record: Record, epoch: int, index: int) -> dict[str, Any]:
        assert self.transform is not None
        record.check("image")
        picture = image_lib.peek(
            record.image, max_pixels=self.max_pixels, background=self.background
        )
        rng = np.random.default_rng((self.seed, epoch, index, IMAGE_STREAM))
        return {"image": self.transform(picture, rng)}

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
class _Collate:
    """Rows -> batch. Texts are tokenized together, features read together."""

    tokenizer: Tokenizer | None
    with_group: bool
    shape: tuple[int, ...] | None
    stores: Mapping[str, FeatureStore]

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        good = np.array(["good" in row for row in rows])
        faults = [row["fault"] for row in rows if row["fault"] is not None]
        batch: dict[str, Any] = {"index": np.array([row["index"] for row in rows], np.int64)}
        epochs = np.array([row["epoch"] for row in rows], np.int64)
        for tower, store in self.stores.items():
            views = epochs % store.views
            if tower in rows[0]["reads"]:
                batch[f"{tower}_features"], usable = store.read(views, batch["index"])
                for j in np.flatnonzero(good & ~usable).tolist():
                    what = f"its {tower} could not be read when cached"
                    faults.append(Fault(rows[j]["key"], Cause.INVALID_FEATURES, what))
                good = good & usable
            else:
                batch[f"{tower}_view"] = views
                batch[f"{tower}_good"] = np.array([f"{tower}_good" in row for row in rows])
        batch |= {"example_mask": good, "faults": _Faults(tuple(faults))}
        if self.shape is not None and "image_features" not in batch:
            blank = np.zeros(self.shape, np.uint8)
            present = batch.get("image_good", good)
            pictures = zip(rows, present, strict=True)
            batch["image"] = np.stack([row["image"] if p else blank for row, p in pictures])
        if self.tokenizer is not None:
            captions = [row.get("caption", Caption("")) for row in rows]
            ids, mask, targets = self.tokenizer.prompted(
                [c.prefix for c in captions], [c.text for c in captions]
            )
            present = batch.get("text_good", good)[:, None]
            batch["text"] = np.where(present, ids, 0).astype(np.int32)
            batch["text_mask"] = mask & present
            batch["target_mask"] = targets & present
        if self.with_group:
            groups = np.array([row.get("group", -1) for row in rows], np.int32)
            batch["group"] = np.where(good, groups, np.int32(-1))
        return batch
