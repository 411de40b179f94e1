"""Build a row from a stream position, and a batch from rows, in threads or worker processes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import grain
import numpy as np
from jaxtyping import Bool

from imgtune_jax.data import image as image_lib
from imgtune_jax.data.caption_sampler import PrefixedCaption
from imgtune_jax.data.record import BadRecord, Fault, FaultCause, Record, read_metadata

if TYPE_CHECKING:
    from imgtune_jax.data.pipeline import Pipeline

# Separate random streams, so that a run without image decoding samples the same captions.
CAPTION_STREAM, IMAGE_STREAM = 0, 1
PADDING_INDEX = -1


@dataclass(frozen=True)
class RowBuilder:
    """`row_builder(local_position)` -> one row. A pure function.

    A position is an index into the stream of all hosts. A local position is an index into this
    host's part of the stream. `complete_views` maps each modality with a feature store to one bool
    per view: whether the store has all rows of that view.
    """

    pipeline: Pipeline
    one_pass: bool
    complete_views: Mapping[str, tuple[bool, ...]]

    @cached_property
    def _shuffled_indices(self) -> grain.MapDataset:
        # Grain derives the order of an epoch from seed + epoch. Without a hash of the seed, epoch e
        # of a run would have the order of epoch e + 1 of a run with the previous seed.
        digest = hashlib.sha256(f"order {self.pipeline.seed}".encode()).digest()
        seed = int.from_bytes(digest[:4])
        return grain.MapDataset.range(len(self.pipeline.source)).shuffle(seed=seed)

    def _shuffled_index(self, position: int) -> int:
        index: Any = self._shuffled_indices[position]
        return int(index)

    def locate(self, local_position: int) -> tuple[int, int]:
        """Return (epoch, record index) of a local position. The index of padding is -1."""
        pipeline = self.pipeline
        size = pipeline.local_batch_size
        step, row = divmod(local_position, size)
        position = step * pipeline.batch_size + pipeline.local_rows[row]
        epoch, index = divmod(position, len(pipeline.source))
        if self.one_pass:
            return (0, PADDING_INDEX) if epoch else (0, index)
        return epoch, self._shuffled_index(position) if pipeline.shuffle else index

    def has_features(self, modality: str, local_position: int) -> bool:
        """Return whether the features of a position's batch are read from the store.

        They are if the store is complete for all views of the batch. The batch here includes the
        rows of all hosts, so that the hosts agree.
        """
        if modality not in self.complete_views:
            return False
        pipeline, complete = self.pipeline, self.complete_views[modality]
        first = local_position // pipeline.local_batch_size * pipeline.batch_size
        ends = (first, first + pipeline.batch_size - 1)
        epochs = {position // len(pipeline.source) for position in ends}
        return all(complete[epoch % len(complete)] for epoch in epochs)

    def __call__(self, local_position: int) -> dict[str, Any]:
        """Return the row: index, epoch, key, fault, and the modalities with cached features.

        It also has the image, the caption and the group, where they are needed and readable.
        """
        local_position = int(local_position)
        epoch, index = self.locate(local_position)
        cached = [name for name in self.complete_views if self.has_features(name, local_position)]
        row = {"index": index, "key": "", "fault": None, "epoch": epoch, "cached": cached}
        if index == PADDING_INDEX:
            return row
        pipeline = self.pipeline
        with_image = pipeline.transform is not None and "image" not in cached
        try:
            record = pipeline.source[index] if with_image else read_metadata(pipeline.source, index)
        except BadRecord as bad:
            record = Record(f"record {index}", faults={"image": bad, "captions": bad})
        row["key"] = record.key
        readers: dict[str, Any] = {}
        if pipeline.caption_sampler is not None:
            readers["text"] = self._read_text
        if with_image:
            readers["image"] = self._read_image
        for modality, read in readers.items():  # both, even if one fails: each has its own store
            views = self.complete_views.get(modality)
            view = epoch if views is None else epoch % len(views)
            try:
                row.update(read(record, view, index))
                row[f"{modality}_good"] = True
            except BadRecord as bad:
                row["fault"] = row["fault"] or Fault(record.key, bad.cause, bad.detail)
        if row["fault"] is None:
            row["good"] = True
        return row

    def _read_text(self, record: Record, view: int, index: int) -> dict[str, Any]:
        sampler = self.pipeline.caption_sampler
        assert sampler is not None
        rng = np.random.default_rng((self.pipeline.seed, view, index, CAPTION_STREAM))
        caption = sampler.first(record) if self.one_pass else sampler(record, rng)
        if not self.pipeline.has_group:
            return {"caption": caption}
        record.check("group")
        return {"caption": caption, "group": record.group}

    def _read_image(self, record: Record, view: int, index: int) -> dict[str, Any]:
        pipeline = self.pipeline
        assert pipeline.transform is not None
        record.check("image")
        image = image_lib.open_image(
            record.image, max_pixels=pipeline.max_pixels, background=pipeline.background
        )
        rng = np.random.default_rng((pipeline.seed, view, index, IMAGE_STREAM))
        return {"image": pipeline.transform(image, rng)}


@dataclass(frozen=True)
class OpaqueFaults:
    """A wrapper for the faults of a batch, since Grain would treat a bare tuple as a subtree."""

    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Collator:
    """`collator(rows)` -> batch. Tokenizes all texts, and reads all cached features, at once.

    `image_shape` is the shape of the transformed images, or None without images.
    """

    pipeline: Pipeline
    one_pass: bool
    image_shape: tuple[int, ...] | None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the arrays of a batch, with zeros in the rows of bad records, and its faults."""
        batch: dict[str, Any] = {"index": np.array([row["index"] for row in rows], np.int64)}
        faults = [row["fault"] for row in rows if row["fault"] is not None]
        good = np.array(["good" in row for row in rows])
        if not self.one_pass:
            good = self._add_features(batch, rows, good, faults)
        batch |= {"example_mask": good, "faults": OpaqueFaults(tuple(faults))}
        if self.image_shape is not None and "image_features" not in batch:
            blank = np.zeros(self.image_shape, np.uint8)
            images = zip(rows, batch.get("image_good", good), strict=True)
            batch["image"] = np.stack(
                [row["image"] if readable else blank for row, readable in images]
            )
        if self.pipeline.tokenizer is not None:
            batch |= self._tokenize(rows, batch.get("text_good", good))
        if self.pipeline.has_group:
            groups = np.array([row.get("group", -1) for row in rows], np.int32)
            batch["group"] = np.where(good, groups, np.int32(-1))
        return batch

    def _add_features(
        self,
        batch: dict[str, Any],
        rows: Sequence[dict[str, Any]],
        good: Bool[np.ndarray, " b"],
        faults: list[Fault],
    ) -> Bool[np.ndarray, " b"]:
        """Add cached features to `batch`, or the view and validity of rows that are to be cached.

        Records that were bad when they were cached are added to `faults`, and are False in the
        returned `good`.
        """
        epochs = np.array([row["epoch"] for row in rows], np.int64)
        for modality, store in self.pipeline.stores.items():
            views = epochs % store.views
            if modality not in rows[0]["cached"]:
                batch[f"{modality}_view"] = views
                batch[f"{modality}_good"] = np.array([f"{modality}_good" in row for row in rows])
                continue
            batch[f"{modality}_features"], valid = store.read(views, batch["index"])
            detail = f"its {modality} could not be read when its features were cached"
            for j in np.flatnonzero(good & ~valid).tolist():
                faults.append(Fault(rows[j]["key"], FaultCause.INVALID_FEATURES, detail))
            good = good & valid
        return good

    def _tokenize(
        self, rows: Sequence[dict[str, Any]], good: Bool[np.ndarray, " b"]
    ) -> dict[str, np.ndarray]:
        """Return text, text_mask and target_mask, truncated to the shortest bucket that fits."""
        tokenizer = self.pipeline.tokenizer
        assert tokenizer is not None
        captions = [row.get("caption", PrefixedCaption("")) for row in rows]
        ids, mask, targets = tokenizer.encode_with_prefix(
            [c.prefix for c in captions], [c.text for c in captions]
        )
        good = good[:, None]
        mask &= good
        buckets = () if self.one_pass else self.pipeline.length_buckets
        longest = mask.sum(1).max()
        length = next(n for n in (*buckets, mask.shape[1]) if n >= longest)
        return {
            "text": np.where(good, ids, 0).astype(np.int32)[:, :length],
            "text_mask": mask[:, :length],
            "target_mask": (targets & good)[:, :length],
        }
