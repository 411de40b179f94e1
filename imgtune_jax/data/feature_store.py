"""Features on disk, one ArrayRecord a row: random access, written in whole segments.

A row is what a locked tower gave for one view of one record: a vector, or a sequence of them. Rows
may be written in any order, by any number of processes; a segment appears when it is complete, so
a process that is killed loses its unfinished segment and nothing else.
"""

from __future__ import annotations

import functools
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Bool, Float, Int

SEGMENT_BYTES = 1 << 28  # of features that are held in memory before they are written
MISSING, PENDING, BROKEN, PRESENT = range(4)  # on disk are the last two
RECORDS_SUFFIX, IDS_SUFFIX = ".array_record", ".ids.npz"
FLOATS = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
STORE_DTYPES = (*FLOATS, "int8")


def encode_rows(values: Float[np.ndarray, "k ... d"], dtype: str) -> list[bytes]:
    """Rows as bytes. int8 has one float32 scale a vector, max|x| / 127, in front of its row."""
    if dtype in FLOATS:
        return [row.tobytes() for row in values.astype(FLOATS[dtype])]
    scale = np.abs(values).max(-1, keepdims=True) / np.float32(127)
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    quantized = np.rint(values / scale).astype(np.int8)
    return [s.tobytes() + q.tobytes() for s, q in zip(scale, quantized, strict=True)]


def decode_rows(
    rows: Sequence[bytes], shape: tuple[int, ...], dtype: str
) -> Float[np.ndarray, "k ..."]:
    """The inverse of `encode`, up to the rounding of `dtype`, in float32."""
    joined = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)
    if dtype in FLOATS:
        return joined.view(FLOATS[dtype]).astype(np.float32).reshape(-1, *shape)
    head = 4 * math.prod(shape[:-1])
    scale = np.ascontiguousarray(joined[:, :head]).view(np.float32).reshape(-1, *shape[:-1], 1)
    return joined[:, head:].view(np.int8).reshape(-1, *shape) * scale


@dataclass(eq=False)
class FeatureStore:
    """Rows of `views` views of `n` records, each of `shape`, kept as `dtype` (one of DTYPES).

    Two processes may fill one folder at a time; `refresh` sees what another has finished.
    """

    folder: Path
    views: int
    num_records: int
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        rows = self.views * self.num_records
        self._state = np.zeros(rows, np.uint8)
        self._segment, self._offset = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        self._segments: dict[Path, Path] = {}  # ids file -> records file, in order of finding
        self._rows: list[tuple[int, bytes]] = []  # written, not on disk yet
        self._bytes, self._seconds = 0, 0.0
        self.seconds, self.computed = 0.0, 0  # what the rows on disk took, and how many they are

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        views: int,
        n: int,
        shape: tuple[int, ...],
        dtype: str,
        key: Mapping[str, Any],
    ) -> FeatureStore:
        """Open or create. `parts` is, by name, all that the values depend on.

        Raises ValueError when the folder holds features of another origin.
        """
        if dtype not in STORE_DTYPES:
            raise ValueError(f"a cache of dtype {dtype!r}; wanted one of {', '.join(STORE_DTYPES)}")
        manifest = {"views": views, "n": n, "shape": list(shape), "dtype": dtype, **key}
        wanted = json.loads(json.dumps(manifest))
        path = folder / "manifest.json"
        if path.exists():
            found = json.loads(path.read_text())
            if changed := differing_keys(found, wanted):
                raise ValueError(
                    f"{folder} holds features of another origin; they differ in "
                    f"{', '.join(changed)}. Remove the folder, or choose another config.cache.path"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f"manifest.{uuid.uuid4().hex}.tmp"
            temporary.write_text(json.dumps(manifest, indent=1) + "\n")
            temporary.replace(path)
        return cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> FeatureStore:
        """An existing store, as its manifest says."""
        m = json.loads((folder / "manifest.json").read_text())
        store = cls(folder, m["views"], m["n"], tuple(m["shape"]), m["dtype"])
        store.refresh()
        return store

    def refresh(self) -> None:
        """Look for segments again."""
        for path in sorted(set(self.folder.glob(f"*{IDS_SUFFIX}")) - self._segments.keys()):
            with np.load(path) as stored:
                ids, broken, seconds = stored["ids"], stored["broken"], float(stored["seconds"])
            self._state[ids] = np.where(broken, BROKEN, PRESENT)
            self._segment[ids] = len(self._segments)
            self._offset[ids] = np.arange(len(ids))
            self._segments[path] = path.with_name(path.name.replace(IDS_SUFFIX, RECORDS_SUFFIX))
            self.seconds, self.computed = self.seconds + seconds, self.computed + len(ids)

    def complete_views(self) -> Bool[np.ndarray, " views"]:
        """Which views hold every record."""
        return np.all(self._state.reshape(self.views, self.num_records) > PENDING, axis=1)

    def contains(self, views: Int[np.ndarray, " k"], indices: Int[np.ndarray, " k"]) -> bool:
        """Are all these rows on disk?"""
        return bool((self._state[views * self.num_records + indices] > PENDING).all())

    @property
    def first_missing(self) -> int:
        """The first row that is not on disk, view after view; the number of rows if all are."""
        missing = np.flatnonzero(self._state <= PENDING)
        return int(missing[0]) if len(missing) else len(self._state)

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum(path.stat().st_size for path in self._segments.values())

    def read(
        self, views: Int[np.ndarray, " k"], indices: Int[np.ndarray, " k"]
    ) -> tuple[Float[np.ndarray, "k ..."], Bool[np.ndarray, " k"]]:
        """Rows in float32, and which of them come from a record that could be read.

        Raises KeyError for a row that is missing.
        """
        ids = views * self.num_records + indices
        state = self._state[ids]
        if (state <= PENDING).any():
            raise KeyError(f"{int((state <= PENDING).sum())} rows are not in {self.folder}")
        out = np.zeros((len(ids), *self.shape), np.float32)
        good, segments = state == PRESENT, list(self._segments.values())
        for segment in np.unique(self._segment[ids[good]]):
            here = np.flatnonzero(good & (self._segment[ids] == segment))
            rows = _reader(segments[segment]).read(self._offset[ids[here]].tolist())
            out[here] = decode_rows(rows, self.shape, self.dtype)
        return out, good

    def write(
        self,
        views: Int[np.ndarray, " k"],
        indices: Int[np.ndarray, " k"],
        values: Float[np.ndarray, "k ..."],
        good: Bool[np.ndarray, " k"],
        *,
        seconds: float = 0.0,
    ) -> Float[np.ndarray, "k ..."]:
        """Take rows in, and return them as they will be read: rounded to `dtype`, broken ones zero.

        They are on disk after `flush`. Rows that are there already are not written twice.
        `seconds` is what computing them took.
        """
        values = np.where(good.reshape(-1, *(1,) * len(self.shape)), values, np.float32(0))
        rows = encode_rows(values, self.dtype)
        ids, firsts = np.unique(views * self.num_records + indices, return_index=True)
        new = self._state[ids] == MISSING
        for row, i in zip(ids[new].tolist(), firsts[new].tolist(), strict=True):
            self._rows.append((row, rows[i] if good[i] else b""))
            self._bytes += len(rows[i])
        self._state[ids[new]] = PENDING
        self._seconds += seconds * new.sum() / len(rows)
        if self._bytes > SEGMENT_BYTES:
            self.flush()
        return decode_rows(rows, self.shape, self.dtype)

    def flush(self) -> None:
        """Make a segment of what was written since the last one."""
        if not self._rows:
            return
        name = self.folder / f"{uuid.uuid4().hex}"
        temporary = name.with_suffix(".tmp")
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for _, row in self._rows:
            writer.write(row)
        writer.close()
        temporary.replace(name.with_suffix(RECORDS_SUFFIX))
        with temporary.open("wb") as f:
            np.savez(
                f,
                ids=np.array([i for i, _ in self._rows], np.int64),
                broken=np.array([not row for _, row in self._rows]),
                seconds=self._seconds,
            )
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(name.with_suffix(IDS_SUFFIX))  # its presence says that both are whole
        self._rows, self._bytes, self._seconds = [], 0, 0.0
        self.refresh()


@functools.lru_cache(maxsize=256)
def _reader(path: Path) -> Any:
    return ArrayRecordReader(str(path), "readahead_buffer_size:0")


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ, or that one side lacks."""
    return [k for k in sorted(a.keys() | b.keys()) if k not in a or k not in b or a[k] != b[k]]
