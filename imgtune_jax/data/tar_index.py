"""Where each member of a tar lies, found once.

A large tar's index is kept beside it, or in the user's cache folder where that is not writable. It
is an npz without pickle, and holds only for the size and modification time it was made for.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

log = logging.getLogger("imgtune_jax.data")
CACHE_MIN_BYTES = 64 << 20  # scanning a smaller tar's headers takes less than a second


@dataclass(frozen=True)
class TarIndex:
    """Names, offsets and sizes of a tar's regular files, in order."""

    path: Path
    names: tuple[str, ...]
    offsets: Int64[np.ndarray, " n"]
    sizes: Int64[np.ndarray, " n"]

    def read(self, member: int) -> bytes:
        """A member's bytes; fewer than its size where the tar was cut off."""
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[member]))
            return file.read(int(self.sizes[member]))


def index_tar(path: Path) -> TarIndex:
    """The tar's index, from its kept file if that still holds, else from the headers.

    Raises ValueError for what is no uncompressed tar.
    """
    stat = path.stat()
    stamp = (stat.st_size, stat.st_mtime_ns)
    if stat.st_size < CACHE_MIN_BYTES:
        return _scan(path)
    places = (path.with_name(path.name + ".index.npz"), _cache_folder() / _cache_name(path))
    for place in places:
        found = _read_cached(place, path, stamp)
        if found is not None:
            return found
    log.info("indexing %s (once)", path)
    index = _scan(path)
    for place in places:
        if _write_cached(place, index, stamp):
            break
    return index


def _scan(path: Path) -> TarIndex:
    names, offsets, sizes = [], [], []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isreg():
                    names.append(info.name)
                    offsets.append(info.offset_data)
                    sizes.append(info.size)
                tar.members = []  # type: ignore[attr-defined]  # else millions of headers stay in memory
    except tarfile.ReadError as error:
        if not names:
            raise ValueError(
                f"{path} is no uncompressed tar ({error}); a compressed one has no random access: "
                "unpack it with gunzip, unxz or unzstd"
            ) from error
        log.warning("%s is cut off after %d files (%s)", path, len(names), error)
    return TarIndex(path, tuple(names), np.array(offsets, np.int64), np.array(sizes, np.int64))


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "imgtune_jax" / "tar_index"


def _cache_name(path: Path) -> str:
    return hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32] + ".npz"


def _read_cached(place: Path, path: Path, stamp: tuple[int, int]) -> TarIndex | None:
    if not place.is_file():
        return None
    try:
        with np.load(place, allow_pickle=False) as kept:
            if tuple(kept["stamp"]) != stamp:
                return None
            names = tuple(kept["names"].tobytes().decode().split("\0"))
            return TarIndex(path, names, kept["offsets"], kept["sizes"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.warning("the kept index %s is not readable (%s); making it anew", place, error)
        return None


def _write_cached(place: Path, index: TarIndex, stamp: tuple[int, int]) -> bool:
    temporary = place.with_name(f"{place.name}.tmp{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(
                file,
                stamp=np.array(stamp),
                names=np.frombuffer("\0".join(index.names).encode(), np.uint8),
                offsets=index.offsets,
                sizes=index.sizes,
            )
        temporary.replace(place)  # whole or not at all: other hosts may be reading
    except OSError as error:
        log.info("index not kept at %s: %s", place, error)
        return False
    return True


def expand_braces(pattern: str) -> list[str]:
    """`a-{000..002}.tar` and `{a,b}.tar` as a shell expands them."""
    start = pattern.find("{")
    end = pattern.find("}", start)
    if start < 0 or end < 0:
        return [pattern]
    body = pattern[start + 1 : end]
    first, dots, last = body.partition("..")
    if dots and first.isdigit() and last.isdigit():
        choices = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    else:
        choices = body.split(",")
    rests = expand_braces(pattern[end + 1 :])
    return [pattern[:start] + c + r for c, r in itertools.product(choices, rests)]
