"""Digests of sources: the records that they list, and the bytes of their files.

A source has two digests. `fingerprint` changes with any file of the source; it is part of the key
of cached features, which must never be those of another image. `listing_fingerprint` is a digest of
the list of records and of a few images. It is cheap and equal for a copy of the files, so a resumed
run compares it.

The mode of a source determines how `fingerprint` recognizes a changed file. With "stat", these are
the file's size and modification time, so a copy has its own cached features. With "content", these
are all bytes. Then every start of a run reads all files, both digests are equal, and copies of the
data share cached features.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from imgtune_jax.errors import UserError

STAT, CONTENT = "stat", "content"
MAX_SAMPLE_BYTES = 1 << 16  # a sample of a file or of a span has at most this many bytes
NUM_SAMPLES = 16


class Fingerprint:
    """Digest of values and of files."""

    def __init__(self, *options: Any) -> None:
        self._hash = hashlib.sha256(repr(options).encode())

    def add(self, *values: Any) -> None:
        """Add values whose `repr` is the same in every process, such as names and sizes."""
        self._hash.update(repr(values).encode())

    def add_samples(self, path: Path, spans: Sequence[tuple[int, int]]) -> None:
        """Add the bytes of about `NUM_SAMPLES` evenly spaced (offset, size) spans of a file."""
        with path.open("rb") as file:
            for offset, size in evenly_sampled(spans):
                file.seek(offset)
                self._hash.update(file.read(min(size, MAX_SAMPLE_BYTES)))

    def add_content(self, path: Path, *, max_bytes: int | None = None) -> None:
        """Add the digest of all bytes of a file.

        Adds None if it is no regular file, cannot be read, or has more than `max_bytes` bytes.
        """
        found = _file_stat(path)
        if found is None or (max_bytes is not None and found.st_size > max_bytes):
            self.add(None)  # opening a pipe would block
            return
        try:
            with path.open("rb") as file:
                self.add(hashlib.file_digest(file, "sha256").digest())
        except OSError:
            self.add(None)

    def hex(self) -> str:
        """Return the digest, 32 hexadecimal digits."""
        return self._hash.hexdigest()[:32]


def check_mode(mode: str) -> None:
    """Raise UserError if `mode` is not a way to recognize a changed file."""
    if mode not in (STAT, CONTENT):
        raise UserError(
            f"fingerprint_mode = {mode!r}; expected 'stat' (sizes and modification times) or "
            "'content' (all bytes)"
        )


def with_file_stats(listing_fingerprint: str, files: Iterable[Path]) -> str:
    """Return the digest of a listing, and of the size and modification time of each file."""
    digest = Fingerprint(listing_fingerprint)
    for file in files:
        found = _file_stat(file)
        digest.add(None if found is None else (found.st_size, found.st_mtime_ns))
    return digest.hex()


def _file_stat(path: Path) -> os.stat_result | None:
    """Return the stat of a regular file, or None if there is none at `path`."""
    try:
        result = path.stat()
    except (OSError, ValueError):  # ValueError: the name has a null byte
        return None
    return result if stat.S_ISREG(result.st_mode) else None


def evenly_sampled(items: Sequence[Any]) -> Sequence[Any]:
    """Return about `NUM_SAMPLES` evenly spaced items."""
    return items[:: max(1, len(items) // NUM_SAMPLES)]
