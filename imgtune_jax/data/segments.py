"""Segments of a feature store: a file of rows and a file of their ids.

A segment becomes visible when its file of ids is renamed, after its rows are complete. The names of
both files begin with the host and the id of the process that writes them. So another process can
tell the files of a writer that still runs from those that a dead one left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Bool, Int

from imgtune_jax.disk_space import explain_full_disk

log = logging.getLogger("imgtune_jax.data")

ROWS_SUFFIX, IDS_SUFFIX, TEMPORARY_SUFFIX = ".array_record", ".ids.npz", ".tmp"
BLOCK, ROW_OVERHEAD = 1 << 16, 64  # bytes; an ArrayRecord file has whole blocks, the last an index
IMPORT_TIME = time.time()
ABANDONED_SECONDS = 24 * 3600  # age from which any such file counts as abandoned


class Segment(NamedTuple):
    """Ids of rows, in the order of the file `rows`. Bad records have empty rows."""

    rows: Path
    ids: Int[np.ndarray, " k"]
    is_bad: Bool[np.ndarray, " k"]
    seconds: float  # how long computing the rows took


class DamagedSegmentError(Exception):
    """A segment whose files do not match, or cannot be read."""


def new_stem() -> str:
    """Return a new name without suffix, which contains the host and the process."""
    return f"{uuid.uuid4().hex[:16]}-{os.getpid()}-{socket.gethostname()}"


def write_segment(folder: Path, rows: Sequence[tuple[int, bytes]], *, seconds: float) -> None:
    """Write (id, row) pairs as a new segment. A row is empty for a bad record.

    If writing fails, no file is left. Raises DiskFullError if the disk is full.
    """
    stem = new_stem()
    suffixes = (ROWS_SUFFIX, IDS_SUFFIX, TEMPORARY_SUFFIX)
    rows_path, ids_path, temporary = files = [folder / f"{stem}{suffix}" for suffix in suffixes]
    num_blocks = 2 + sum(len(row) + ROW_OVERHEAD for _, row in rows) // BLOCK
    name = f"a segment of {len(rows)} cached rows"
    with explain_full_disk(folder, name, wanted=num_blocks * BLOCK):
        try:
            _write_rows(temporary, [row for _, row in rows])
            temporary.replace(rows_path)
            _write_ids(temporary, rows, seconds)
            # This file is renamed last: its presence marks both files as complete.
            temporary.replace(ids_path)
        except BaseException:
            for file in files:
                file.unlink(missing_ok=True)
            raise


def _write_rows(path: Path, rows: Sequence[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    try:
        for row in rows:
            writer.write(row)
    finally:
        writer.close()


def _write_ids(path: Path, rows: Sequence[tuple[int, bytes]], seconds: float) -> None:
    with path.open("wb") as file:
        np.savez(
            file,
            ids=np.array([i for i, _ in rows], np.int64),
            broken=np.array([not row for _, row in rows]),
            seconds=seconds,
        )
        file.flush()
        os.fsync(file.fileno())


def read_segment(ids_path: Path, *, num_rows: int) -> Segment:
    """Read the ids of a segment, and check them against its rows and the store's `num_rows`.

    Raises DamagedSegmentError if a file is missing, truncated or does not match.
    """
    rows_path = _rows_path(ids_path)
    try:
        with np.load(ids_path, allow_pickle=False) as stored:
            ids, is_bad, seconds = stored["ids"], stored["broken"], float(stored["seconds"])
        reader = ArrayRecordReader(str(rows_path), "readahead_buffer_size:0")
        num_stored = reader.num_records()
        reader.close()
    except Exception as error:  # a damaged file may cause any error in the libraries that read it
        raise DamagedSegmentError(f"{ids_path.name} or {rows_path.name}: {error}") from error
    if not len(ids) == len(is_bad) == num_stored:
        raise DamagedSegmentError(f"{rows_path.name} has {num_stored} rows, not {len(ids)}")
    if len(ids) and not 0 <= ids.min() <= ids.max() < num_rows:
        raise DamagedSegmentError(f"{ids_path.name} has ids outside of 0 to {num_rows - 1}")
    return Segment(rows_path, ids, is_bad, seconds)


def remove_segments(ids_paths: Iterable[Path]) -> None:
    """Remove both files of segments that cannot be used, with a warning."""
    for ids_path in ids_paths:
        log.warning("removing the segment %s; its rows are computed again", ids_path)
        for path in (ids_path, _rows_path(ids_path)):
            _remove(path)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary and unpaired files of writers that no longer run."""
    for path in folder.iterdir():
        ids_path = path.with_name(path.name.removesuffix(ROWS_SUFFIX) + IDS_SUFFIX)
        is_unpaired = path.name.endswith(ROWS_SUFFIX) and not ids_path.exists()
        if (is_unpaired or path.suffix == TEMPORARY_SUFFIX) and _is_abandoned(path):
            log.warning("removing %s, which an earlier process left incomplete", path)
            _remove(path)


def _rows_path(ids_path: Path) -> Path:
    return ids_path.with_name(ids_path.name.removesuffix(IDS_SUFFIX) + ROWS_SUFFIX)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # another process removed it, or the folder is read-only
        path.unlink()


def _is_abandoned(path: Path) -> bool:
    """Return whether the process that began to write a file has ended."""
    try:
        modified = path.stat().st_mtime
    except OSError:
        return False
    if time.time() - modified > ABANDONED_SECONDS:
        return True
    writer = re.match(r"[^-]+-(\d+)-(.+?)(\.array_record|\.tmp)$", path.name)
    if writer is None or writer[2] != socket.gethostname():
        return False
    pid = int(writer[1])
    if pid == os.getpid():  # or an earlier process had the same id, as in a restarted container
        return modified < IMPORT_TIME
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # the process runs, and belongs to another user
        return False
    return False
