"""A lock file in a run's folder, so that only one process at a time trains there."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from imgtune_jax.errors import UserError

LOCK = "train.lock"


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    `started` is its start time, which tells it from a later process with the same pid. It is "" if
    the operating system does not tell.
    """

    host: str
    pid: int
    started: str

    @classmethod
    def this_process(cls) -> Owner:
        """Return this process."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _start_time(pid) or "")

    def has_ended(self) -> bool:
        """Whether this process of the same host has ended."""
        started = _start_time(self.pid)
        return started is None or (bool(self.started) and started not in ("", self.started))


@contextlib.contextmanager
def hold_lock(workdir: Path) -> Iterator[None]:
    """Create `workdir` and hold its lock, on the first host.

    The lock of a process of this host that has ended is taken over. Raises UserError if another
    process holds the lock.
    """
    if jax.process_index() != 0:
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    path, owner = workdir / LOCK, Owner.this_process()
    with _one_at_a_time(workdir):
        _acquire(path, owner)
    try:
        yield
    finally:
        if _read_owner(path) == owner:
            path.unlink()


def _acquire(path: Path, owner: Owner) -> None:
    temporary = path.with_name(f"{LOCK}.{owner.host}-{owner.pid}.tmp")
    temporary.write_text(json.dumps(dataclasses.asdict(owner)) + "\n")
    try:
        if (other := _read_owner(path)) is not None:
            _check_ended(other, path, owner.host)
            path.unlink(missing_ok=True)
        # A link appears with its full content, and fails if another host has created the file.
        os.link(temporary, path)
    except FileExistsError:
        other = _read_owner(path) or Owner("another host", 0, "")
        _check_ended(other, path, owner.host)
    except OSError:  # some file systems, such as those of object stores, have no links
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_ended(other: Owner, path: Path, host: str) -> None:
    """Raise UserError unless the owner of the lock is a process of this host that has ended."""
    if other.host != host:
        raise UserError(
            f"process {other.pid} on the host {other.host} trains in {path.parent}; only one "
            f"process may. Whether it still runs cannot be seen from this host, {host}: if it has "
            f"ended, delete {path}; if not, stop it or choose another --workdir"
        )
    if not other.has_ended():
        raise UserError(
            f"process {other.pid} of this host trains in {path.parent}; only one process may. Wait "
            f"until it ends, stop it (kill {other.pid}), or choose another --workdir"
        )


def _read_owner(path: Path) -> Owner | None:
    """Return the owner of a lock, or None if there is no lock."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    try:
        return Owner(**json.loads(text))
    except (TypeError, ValueError):
        raise UserError(
            f"{path} is not a lock file of a run: {text[:60]!r}; delete it if no process trains in "
            f"{path.parent}"
        ) from None


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Exclude other processes of this host, so that two of them do not take over one lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems have no flock. There, the hard link alone has to suffice.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _start_time(pid: int) -> str | None:
    """Return the start time of a running process; "" if unknown, None if no such process runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # a process of another user
    try:
        # The name of the program, in parentheses, may contain spaces: split what follows it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    state, started = fields[0], fields[19]
    return None if state == "Z" else started  # a zombie has ended
