"""Index of the members of a tar: names, offsets and sizes.

The index of a large tar is cached next to the tar, or in the user's cache folder if the tar's
folder is not writable. The cached index is an .npz file without pickled objects. It is valid while
the size and the modification time of the tar are unchanged.
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

from imgtune_jax.errors import UserError

log = logging.getLogger("imgtune_jax.data")
CACHE_MIN_BYTES = 64 << 20  # smaller tars are scanned instead, in less than a second


@dataclass(frozen=True)
class TarIndex:
    """Names, offsets and sizes of the regular files of a tar, in the order of the tar."""

    path: Path
    names: tuple[str, ...]
    offsets: Int64[np.ndarray, " n"]
    sizes: Int64[np.ndarray, " n"]

    def read(self, member: int) -> bytes:
        """Return the bytes of a member. They are fewer than its size if the tar is truncated."""
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[member]))
            return file.read(int(self.sizes[member]))


def index_tar(path: Path) -> TarIndex:
    """Return the index of a tar: the cached one if it is valid, else from the tar's headers.

    Raises UserError if the file is not an uncompressed tar.
    """
    stat = path.stat()
    stamp = (stat.st_size, stat.st_mtime_ns)
    if stat.st_size < CACHE_MIN_BYTES:
        return _scan_headers(path)
    cache_paths = (
        path.with_name(path.name + ".index.npz"),
        _user_cache_folder() / _cache_name(path),
    )
    for cache_path in cache_paths:
        cached = _read_cached(cache_path, path, stamp)
        if cached is not None:
            return cached
    log.info("indexing %s (the index is cached)", path)
    index = _scan_headers(path)
    for cache_path in cache_paths:
        if _write_cached(cache_path, index, stamp):
            break
    return index


def _scan_headers(path: Path) -> TarIndex:
    names, offsets, sizes = [], [], []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isreg():
                    names.append(info.name)
                    offsets.append(info.offset_data)
                    sizes.append(info.size)
                # Otherwise tarfile keeps all headers in memory, which may be millions.
                tar.members = []  # type: ignore[attr-defined]
    except tarfile.ReadError as error:
        if not names:
            raise UserError(
                f"{path} is not an uncompressed tar ({error}); a compressed tar has no random "
                "access: unpack it with gunzip, unxz or unzstd"
            ) from error
        log.warning("%s is truncated after %d files (%s)", path, len(names), error)
    return TarIndex(path, tuple(names), np.array(offsets, np.int64), np.array(sizes, np.int64))


def _user_cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "imgtune_jax" / "tar_index"


def _cache_name(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32] + ".npz"


def _read_cached(cache_path: Path, path: Path, stamp: tuple[int, int]) -> TarIndex | None:
    if not cache_path.is_file():
        return None
    try:
        with np.load(cache_path, allow_pickle=False) as cached:
            if tuple(cached["stamp"]) != stamp:
                return None
            names = tuple(cached["names"].tobytes().decode().split("\0"))
            return TarIndex(path, names, cached["offsets"], cached["sizes"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.warning("cannot read the cached index %s (%s); scanning the tar", cache_path, error)
        return None


def _write_cached(cache_path: Path, index: TarIndex, stamp: tuple[int, int]) -> bool:
    temporary = cache_path.with_name(f"{cache_path.name}.tmp{os.getpid()}")
    try:
        cache_path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(
                file,
                stamp=np.array(stamp),
                names=np.frombuffer("\0".join(index.names).encode(), np.uint8),
                offsets=index.offsets,
                sizes=index.sizes,
            )
        temporary.replace(cache_path)  # atomic: other hosts may be reading it
    except OSError as error:
        log.info("cannot cache the index at %s: %s", cache_path, error)
        return False
    return True


def expand_braces(pattern: str) -> list[str]:
    """Expand `a-{000..002}.tar` and `{a,b}.tar` as a shell does; `{a}` has no choice and stays."""
    start = pattern.find("{")
    end = pattern.find("}", start)
    if start < 0 or end < 0:
        return [pattern]
    body = pattern[start + 1 : end]
    first, dots, last = body.partition("..")
    if dots and first.isdigit() and last.isdigit():
        step = 1 if int(first) <= int(last) else -1
        digits = len(first) if first.startswith("0") else 1
        choices = [f"{n:0{digits}d}" for n in range(int(first), int(last) + step, step)]
    else:
        choices = body.split(",") if "," in body else [f"{{{body}}}"]
    suffixes = expand_braces(pattern[end + 1 :])
    pairs = itertools.product(choices, suffixes)
    return [pattern[:start] + choice + suffix for choice, suffix in pairs]
