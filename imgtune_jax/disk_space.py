"""The error of a full disk, as one message: bytes wanted, bytes free, what to do."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from imgtune_jax.errors import DiskFullError

FULL = (errno.ENOSPC, errno.EDQUOT)
# Libraries that write files in C++ state the operating system's message only.
FULL_MESSAGES = ("No space left on device", "Disk quota exceeded")


@contextlib.contextmanager
def explain_full_disk(folder: Path, name: str, *, wanted: int | None = None) -> Iterator[None]:
    """Raise DiskFullError if the block fails because the disk that has `folder` is full.

    `name` is what is written, and `wanted` its size in bytes, for the message.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFullError) or not is_disk_full(error):
            raise
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        size = "" if wanted is None else f", {wanted:,} bytes,"
        raise DiskFullError(
            f"the disk is full: {name}{size} cannot be written to {folder}, which has {free:,} "
            "bytes free"
        ) from error


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an exception, or one that caused it, is the error of a full disk or quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(message in str(error) for message in FULL_MESSAGES):
            return True
        error = error.__cause__ or error.__context__
    return False
