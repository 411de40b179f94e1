"""Scalars in TensorBoard's format.

`tensorboardX.SummaryWriter` writes in a thread. If the disk is full, the thread ends, and the next
calls wait for it forever. So this class writes in the caller's thread.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)


class TensorboardLog:
    """The scalars of a run that starts after step `start`, in a new file in `folder`."""

    def __init__(self, folder: Path, *, start: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        # TensorBoard then drops what an earlier process wrote from step start + 1 on.
        session = SessionLog(status=SessionLog.START)
        self._write(Event(step=start + 1, session_log=session))

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step, and flush them to the file."""
        for name, value in values.items():
            scalar = summary.scalar(name.replace("@", "_at_"), value)
            self._write(Event(step=step, summary=scalar))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # `add_scalars` has written and reported everything
            self._writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
