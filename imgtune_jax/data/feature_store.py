"""Cached features on disk, with random access to rows.

A row is the output of a tower's frozen prefix for one view of one record: a vector, or a sequence
of vectors. A view is one random augmentation of an image, or one sampled caption of a record.

Rows may be written in any order and by any number of processes. A process writes its rows in
segments (`segments.py`). So a process that is killed loses only the rows after its last segment. A
damaged segment is named in a warning, and its rows count as missing.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Bool, Float, Int

from imgtune_jax.data import segments
from imgtune_jax.errors import UserError

log = logging.getLogger("imgtune_jax.data")

SEGMENT_BYTES = 1 << 28  # size of features in memory above which they are written
MISSING, PENDING, BAD_RECORD, PRESENT = range(4)  # states of a row; the last two are on disk
MANIFEST = "manifest.json"
FLOAT_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
STORE_DTYPES = (*FLOAT_DTYPES, "int8")


def encode_rows(values: Float[np.ndarray, "k ... d"], dtype: str) -> list[bytes]:
    """Encode rows as bytes. An int8 row begins with its float32 scales, max|x| / 127 per vector."""
    if dtype in FLOAT_DTYPES:
        return [row.tobytes() for row in values.astype(FLOAT_DTYPES[dtype])]
    scale = np.abs(values).max(-1, keepdims=True) / np.float32(127)
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    quantized = np.rint(values / scale).astype(np.int8)
    return [s.tobytes() + q.tobytes() for s, q in zip(scale, quantized, strict=True)]


def decode_rows(
    rows: Sequence[bytes], shape: tuple[int, ...], dtype: str
) -> Float[np.ndarray, "k ..."]:
    """Decode rows to float32: the inverse of `encode_rows`, up to the rounding of `dtype`."""
    joined = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)
    if dtype in FLOAT_DTYPES:
        return joined.view(FLOAT_DTYPES[dtype]).astype(np.float32).reshape(-1, *shape)
    scale_bytes = 4 * math.prod(shape[:-1])
    scale = (
        np.ascontiguousarray(joined[:, :scale_bytes]).view(np.float32).reshape(-1, *shape[:-1], 1)
    )
    return joined[:, scale_bytes:].view(np.int8).reshape(-1, *shape) * scale


@dataclass(eq=False)
class FeatureStore:
    """Rows for `views` views of `num_records` records, each of `shape`, stored as `dtype`.

    `dtype` is one of STORE_DTYPES. The id of a row is view * num_records + (index of the record).
    Several processes may fill one folder; `refresh` finds the segments that others completed.
    `num_rows` is the number of rows on disk; computing them took `compute_seconds`.
    """

    folder: Path
    views: int
    num_records: int
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        rows = self.views * self.num_records
        # For each row: its state, the number of its segment, and its position in the segment.
        self._state = np.zeros(rows, np.uint8)
        self._segment, self._offset = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        self._segments: dict[Path, Path] = {}  # ids file -> rows file, by segment number
        self._damaged: set[Path] = set()  # ids files of segments that cannot be read
        self._pending: list[tuple[int, bytes]] = []  # (id, bytes) of rows not on disk yet
        self._pending_bytes, self._pending_seconds = 0, 0.0
        self.num_rows, self.compute_seconds = 0, 0.0

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        views: int,
        num_records: int,
        shape: tuple[int, ...],
        dtype: str,
        key: Mapping[str, Any],
    ) -> FeatureStore:
        """Open or create a store. `key` maps names to whatever else the features depend on.

        Damaged segments and files that a dead process left incomplete are removed. Raises UserError
        if the folder contains features with another key or other arguments.
        """
        if dtype not in STORE_DTYPES:
            raise UserError(f"dtype = {dtype!r}; expected one of {', '.join(STORE_DTYPES)}")
        manifest = {"views": views, "n": num_records, "shape": list(shape), "dtype": dtype, **key}
        unknown = list(folder.glob(f"*{segments.IDS_SUFFIX}"))
        existing, expected = read_manifest(folder), json.loads(json.dumps(manifest))
        if existing is not None:
            if changed := differing_keys(existing, expected):
                raise UserError(
                    f"{folder} contains features with another key; these entries differ: "
                    f"{', '.join(changed)}. Remove the folder, or set another config.cache.path"
                )
        else:
            # Writers save the manifest first, so without one the key of these segments is unknown.
            segments.remove_segments(unknown)
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f"{segments.new_stem()}{segments.TEMPORARY_SUFFIX}"
            temporary.write_text(json.dumps(manifest, indent=1) + "\n")
            temporary.replace(folder / MANIFEST)
        segments.remove_leftovers(folder)
        store = cls.load(folder)
        segments.remove_segments(store._damaged)
        return store

    @classmethod
    def load(cls, folder: Path) -> FeatureStore:
        """Load an existing store, with the settings of its manifest, without changing its files.

        Raises UserError if there is no readable manifest.
        """
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder} has no readable {MANIFEST}, so it is no feature store")
        store = cls(
            folder,
            views=manifest["views"],
            num_records=manifest["n"],
            shape=tuple(manifest["shape"]),
            dtype=manifest["dtype"],
        )
        store.refresh()
        return store

    def refresh(self) -> None:
        """Find segments that were completed since the last call. Warn of damaged ones."""
        known = self._segments.keys() | self._damaged
        for path in sorted(set(self.folder.glob(f"*{segments.IDS_SUFFIX}")) - known):
            try:
                segment = segments.read_segment(path, num_rows=len(self._state))
            except segments.DamagedSegmentError as error:
                log.warning("%s: damaged, its rows are computed again: %s", self.folder, error)
                self._damaged.add(path)
                continue
            ids = segment.ids
            self._state[ids] = np.where(segment.is_bad, BAD_RECORD, PRESENT)
            self._segment[ids] = len(self._segments)
            self._offset[ids] = np.arange(len(ids))
            self._segments[path] = segment.rows
            self.num_rows += len(ids)
            self.compute_seconds += segment.seconds

    def complete_views(self) -> Bool[np.ndarray, " views"]:
        """Return, for each view, whether its rows of all records are on disk."""
        return np.all(self._state.reshape(self.views, self.num_records) > PENDING, axis=1)

    def contains(self, views: Int[np.ndarray, " k"], indices: Int[np.ndarray, " k"]) -> bool:
        """Return whether all these rows are on disk."""
        return bool((self._state[views * self.num_records + indices] > PENDING).all())

    @property
    def first_missing(self) -> int:
        """Id of the first row that is not on disk; views * num_records if all are."""
        missing = np.flatnonzero(self._state <= PENDING)
        return int(missing[0]) if len(missing) else len(self._state)

    @property
    def bytes(self) -> int:
        """Size of the features on disk, in bytes."""
        return sum(path.stat().st_size for path in self._segments.values())

    def read(
        self, views: Int[np.ndarray, " k"], indices: Int[np.ndarray, " k"]
    ) -> tuple[Float[np.ndarray, "k ..."], Bool[np.ndarray, " k"]]:
        """Return (rows in float32, mask that is False for bad records).

        Raises KeyError if a row is not on disk, and UserError if its segment is damaged.
        """
        ids = views * self.num_records + indices
        state = self._state[ids]
        if (state <= PENDING).any():
            raise KeyError(f"{int((state <= PENDING).sum())} rows are not in {self.folder}")
        out = np.zeros((len(ids), *self.shape), np.float32)
        valid, files = state == PRESENT, list(self._segments.values())
        for segment in np.unique(self._segment[ids[valid]]):
            in_segment = np.flatnonzero(valid & (self._segment[ids] == segment))
            rows = _read_rows(files[segment], self._offset[ids[in_segment]].tolist())
            out[in_segment] = decode_rows(rows, self.shape, self.dtype)
        return out, valid

    def write(
        self,
        views: Int[np.ndarray, " k"],
        indices: Int[np.ndarray, " k"],
        values: Float[np.ndarray, "k ..."],
        valid: Bool[np.ndarray, " k"],
        *,
        written: Bool[np.ndarray, " k"] | None = None,
        seconds: float = 0.0,
    ) -> Float[np.ndarray, "k ..."]:
        """Add rows, and return them as `read` will return them: rounded, and 0 for bad records.

        `valid` is False for bad records, and `written` for rows that another process adds;
        `seconds` is how long computing the rows took. The rows are on disk after `flush`. Rows that
        the store already has are not written again.

        Raises UserError if a row that is not of a bad record is not finite.
        """
        values = np.where(valid.reshape(-1, *(1,) * len(self.shape)), values, np.float32(0))
        self._check_finite(values, indices)
        rows = encode_rows(values, self.dtype)
        decoded = decode_rows(rows, self.shape, self.dtype)
        self._check_finite(decoded, indices)  # bfloat16 rounds the largest numbers to infinity
        ids, positions = np.unique(views * self.num_records + indices, return_index=True)
        new = self._state[ids] == MISSING
        if written is not None:
            new &= written[positions]
        for row_id, i in zip(ids[new].tolist(), positions[new].tolist(), strict=True):
            self._pending.append((row_id, rows[i] if valid[i] else b""))
            self._pending_bytes += len(rows[i])
        self._state[ids[new]] = PENDING
        self._pending_seconds += seconds * new.sum() / len(rows)
        if self._pending_bytes > SEGMENT_BYTES:
            self.flush()
        return decoded

    def _check_finite(
        self, values: Float[np.ndarray, "k ..."], indices: Int[np.ndarray, " k"]
    ) -> None:
        finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
        if finite.all():
            return
        bad = indices[~finite]
        raise UserError(
            f"the features of {len(bad)} of {len(indices)} records are NaN or infinite (such as "
            f"record {bad[0]}), so they are not cached in {self.folder}; check that the weights of "
            f"the locked tower are finite, and that {self.dtype} (config.cache.dtype) and "
            "config.model.dtype can represent its outputs"
        )

    def flush(self) -> None:
        """Write the rows that were added since the last segment, as a new segment."""
        if not self._pending:
            return
        segments.write_segment(self.folder, self._pending, seconds=self._pending_seconds)
        self._pending, self._pending_bytes, self._pending_seconds = [], 0, 0.0
        self.refresh()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a store: its arguments and its key. None if it cannot be read."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        log.warning("%s is damaged: %s", path, error)
        return None
    return manifest if isinstance(manifest, dict) else None


def _read_rows(path: Path, offsets: Sequence[int]) -> list[bytes]:
    try:
        return _open_reader(path).read(offsets)
    except Exception as error:  # a damaged file may cause any error in the library that reads it
        raise UserError(
            f"{path} is damaged: {error}. Remove it and run the same command again; its rows are "
            "then computed again"
        ) from error


@functools.lru_cache(maxsize=256)
def _open_reader(path: Path) -> Any:
    return ArrayRecordReader(str(path), "readahead_buffer_size:0")


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return the sorted keys that only one mapping has, or whose values differ."""
    return [k for k in sorted(a.keys() | b.keys()) if k not in a or k not in b or a[k] != b[k]]
