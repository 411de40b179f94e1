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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from imgtune_jax.data.record import BadRecord, FaultCause, printable
from imgtune_jax.errors import UserError

log = logging.getLogger("imgtune_jax.data")
CACHE_MIN_BYTES = 64 << 20  # smaller tars are scanned instead, in less than a second
INDEX_VERSION = 2  # increment it if the index of an unchanged tar changes
MAX_CHUNK = 1 << 20
MAX_SIZE = 1 << 62
# Negative offsets are those of members without bytes of their own.
BROKEN_LINK, SPARSE = -1, -2
REASONS = {
    BROKEN_LINK: "is a hard link to a member that is not before it",
    SPARSE: "is a sparse file, which cannot be read in place; write the tar without --sparse",
}


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class TarIndex:
    """Names, offsets and sizes of the files of a tar, in the order of the tar.

    A hard link has the offset and the size of its target.
    """

    path: Path
    names: tuple[str, ...]
    offsets: Int64[np.ndarray, " n"]
    sizes: Int64[np.ndarray, " n"]

    def read(self, member: int, *, max_bytes: int) -> bytes:
        """Return the bytes of a member.

        Raises BadRecord if they are not all in the tar, or more than `max_bytes`.
        """
        offset, size = int(self.offsets[member]), int(self.sizes[member])
        if offset < 0:
            raise self._unreadable(member, REASONS[offset])
        if size > max_bytes:
            raise self._unreadable(member, f"has {size} bytes; expected at most {max_bytes}")
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise self._unreadable(member, f"cannot be read: {error}") from error
        if len(data) < size:
            raise self._unreadable(
                member, f"has {len(data)} of {size} bytes, since the tar is truncated"
            )
        return data

    def _unreadable(self, member: int, reason: str) -> BadRecord:
        detail = f"{self.names[member]} in {self.path.name} {reason}"
        return BadRecord(FaultCause.UNREADABLE_FILE, detail)


def index_tar(path: Path) -> TarIndex:
    """Return the index of a tar: the cached one if it is valid, else from the tar's headers.

    Raises UserError if the file is not an uncompressed tar.
    """
    stat = path.stat()
    stamp = (INDEX_VERSION, stat.st_size, stat.st_mtime_ns)
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
    members: list[_Member] = []
    targets: dict[int, str] = {}  # of hard links
    skipped: list[str] = []
    with _open_tar(path) as tar:
        for info in _read_headers(tar, path):
            if info.islnk():
                targets[len(members)] = info.linkname
                members.append(_Member(info.name, BROKEN_LINK, 0))
            elif info.isreg():
                offset = SPARSE if info.issparse() else info.offset_data
                members.append(_Member(info.name, offset, min(info.size, MAX_SIZE)))
            elif not info.isdir():
                skipped.append(info.name)
    if skipped:
        log.warning("%s: %d symbolic links or devices are not used: %s",
                    path, len(skipped), printable(", ".join(skipped[:5])))  # fmt: skip
    _resolve_links(members, targets)
    names, offsets, sizes = zip(*members, strict=True) if members else ((), (), ())
    return TarIndex(path, names, np.array(offsets, np.int64), np.array(sizes, np.int64))


def _open_tar(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # tarfile raises any exception on a malformed header
        raise UserError(
            f"{path} is not an uncompressed tar ({error}); a compressed tar has no random "
            "access: unpack it with gunzip, unxz or unzstd"
        ) from error


def _read_headers(tar: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of a tar, and of tars that are appended to it.

    Bytes that are no header are skipped, in blocks, with a warning.
    """
    total, position = path.stat().st_size, 0
    tar.ignore_zeros = True  # goes on after the zeros that end a tar, and after damaged headers
    while True:
        start = tar.offset
        try:
            info = tar.next()
        except Exception:  # tarfile raises any exception on a malformed header
            if tar.offset <= start:
                tar.offset = start + tarfile.BLOCKSIZE
            if tar.offset >= total:
                break
            continue
        if info is None:
            break
        # Otherwise tarfile keeps all headers in memory, which may be millions.
        tar.members = []  # type: ignore[attr-defined]
        if info.size < 0 or tar.offset <= info.offset:  # malformed: the next header is after it
            tar.offset = max(info.offset, position) + tarfile.BLOCKSIZE
            continue
        _warn_of_damage(path, position, info.offset)
        position = tar.offset
        yield info
    if position > total:
        log.warning("%s is truncated: %d bytes are missing", path, position - total)
    _warn_of_damage(path, position, total)


def _warn_of_damage(path: Path, start: int, end: int) -> None:
    """Warn if the bytes from `start` to `end` of a tar are others than zeros, which end a tar."""
    if start >= end:
        return
    with path.open("rb") as file:
        file.seek(start)
        for chunk_start in range(start, end, MAX_CHUNK):
            if file.read(min(MAX_CHUNK, end - chunk_start)).strip(b"\0"):
                log.warning(
                    "%s is damaged: the bytes %d to %d are no member, and are skipped; write the "
                    "tar again if records are missing", path, start, end
                )  # fmt: skip
                return


def _resolve_links(members: list[_Member], targets: Mapping[int, str]) -> None:
    """Set the offset and size of hard links to those of the newest earlier member of that name."""
    if not targets:
        return
    position: dict[str, int] = {}
    for i, member in enumerate(members):
        if i in targets and targets[i] in position:
            members[i] = members[position[targets[i]]]._replace(name=member.name)
        position[member.name] = i


def _user_cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "imgtune_jax" / "tar_index"


def _cache_name(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32] + ".npz"


def _read_cached(cache_path: Path, path: Path, stamp: tuple[int, ...]) -> TarIndex | None:
    if not cache_path.is_file():
        return None
    try:
        with np.load(cache_path, allow_pickle=False) as cached:
            if tuple(cached["stamp"]) != stamp:
                return None
            names = cached["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")
            if len(names) != len(cached["offsets"]):  # a name contains the separator
                return None
            return TarIndex(path, tuple(names), cached["offsets"], cached["sizes"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.warning("cannot read the cached index %s (%s); scanning the tar", cache_path, error)
        return None


def _write_cached(cache_path: Path, index: TarIndex, stamp: tuple[int, ...]) -> bool:
    temporary = cache_path.with_name(f"{cache_path.name}.tmp{os.getpid()}")
    names = "\0".join(index.names).encode("utf-8", "surrogateescape")
    try:
        cache_path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(
                file,
                stamp=np.array(stamp),
                names=np.frombuffer(names, np.uint8),
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
