"""Stream position -> row, and rows -> batch: what threads and worker processes run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import grain
import numpy as np

from imgtune_jax.data import image as image_lib
from imgtune_jax.data.caption_sampler import CaptionSampler, PrefixedCaption
from imgtune_jax.data.feature_store import FeatureStore
from imgtune_jax.data.record import BadRecord, Fault, FaultCause, Record, Source, read_metadata
from imgtune_jax.data.tokenizer import Tokenizer
from imgtune_jax.data.transforms import Compose

CAPTION_STREAM, IMAGE_STREAM = 0, 1  # apart, so a run without decoding draws the same captions
PADDING_INDEX = -1


@dataclass(frozen=True)
class RowBuilder:
    """Local stream position -> one row. Pure, and what worker processes run."""

    source: Source
    transform: Compose | None
    captions: CaptionSampler | None
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
            return 0, PADDING_INDEX
        return epoch, self._shuffled(position) if self.shuffle else index

    def has_features(self, tower: str, local: int) -> bool:
        """Does a position's whole batch, on all hosts, find its features in the store?"""
        if tower not in self.views:
            return False
        first = local // (self.batch_size // self.host_count) * self.batch_size
        epochs = {p // len(self.source) for p in (first, first + self.batch_size - 1)}
        return all(self.complete[tower][epoch % self.views[tower]] for epoch in epochs)

    def __call__(self, local: int) -> dict[str, Any]:
        epoch, index = self.locate(int(local))
        row: dict[str, Any] = {"index": index, "key": "", "fault": None, "epoch": epoch}
        row["reads"] = [t for t in self.views if self.has_features(t, int(local))]
        if index == PADDING_INDEX:
            return row
        with_image = self.transform is not None and "image" not in row["reads"]
        record = self.source[index] if with_image else read_metadata(self.source, index)
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
        picture = image_lib.open_image(
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
class OpaqueFaults:
    """One leaf to Grain, whatever it holds."""

    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Collator:
    """Rows -> batch. Texts are tokenized together, features read together."""

    tokenizer: Tokenizer | None
    with_group: bool
    shape: tuple[int, ...] | None
    stores: Mapping[str, FeatureStore]
    length_buckets: tuple[int, ...]

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
                    faults.append(Fault(rows[j]["key"], FaultCause.INVALID_FEATURES, what))
                good = good & usable
            else:
                batch[f"{tower}_view"] = views
                batch[f"{tower}_good"] = np.array([f"{tower}_good" in row for row in rows])
        batch |= {"example_mask": good, "faults": OpaqueFaults(tuple(faults))}
        if self.shape is not None and "image_features" not in batch:
            blank = np.zeros(self.shape, np.uint8)
            present = batch.get("image_good", good)
            pictures = zip(rows, present, strict=True)
            batch["image"] = np.stack([row["image"] if p else blank for row, p in pictures])
        if self.tokenizer is not None:
            captions = [row.get("caption", PrefixedCaption("")) for row in rows]
            ids, mask, targets = self.tokenizer.encode_with_prefix(
                [c.prefix for c in captions], [c.text for c in captions]
            )
            present = batch.get("text_good", good)[:, None]
            mask &= present
            longest, lengths = mask.sum(1).max(), (*self.length_buckets, mask.shape[1])
            short = slice(next(length for length in lengths if length >= longest))
            batch["text"] = np.where(present, ids, 0).astype(np.int32)[:, short]
            batch["text_mask"] = mask[:, short]
            batch["target_mask"] = (targets & present)[:, short]
        if self.with_group:
            groups = np.array([row.get("group", -1) for row in rows], np.int32)
            batch["group"] = np.where(good, groups, np.int32(-1))
        return batch
