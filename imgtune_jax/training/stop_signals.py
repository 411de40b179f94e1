"""SIGINT (Ctrl-C) and SIGTERM end a run quietly, after the current step has been saved."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

import jax

log = logging.getLogger("imgtune_jax.training")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Handlers of SIGINT and SIGTERM in a `with` statement.

    A signal raises SystemExit with the status that a shell reports for it: 130 or 143. Within
    `deferred`, the signal is only recorded in `received`, so that the caller can save and then call
    `exit`. Within `immediate`, it raises again. A second SIGINT ends the process at once.

    With several hosts, no handler is installed, since JAX handles SIGTERM and makes the hosts agree
    on a step.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._is_deferred = False
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        """Install the handlers."""
        if jax.process_count() == 1:
            for signum in SIGNALS:
                self._previous_handlers[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the handlers that were installed before."""
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)
        if self.received is not None:
            name = self.received.name
            log.warning("stopped by %s; the same command resumes from the newest checkpoint", name)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Record a signal; raise SystemExit at the end of the `with` statement."""
        with self._set_deferred(True):
            yield
        if self.received is not None:
            self.exit()

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """Raise SystemExit at a signal, inside `deferred`."""
        if self.received is not None:
            self.exit()
        with self._set_deferred(False):
            yield

    def exit(self) -> NoReturn:
        """Raise SystemExit with the status of the received signal."""
        raise SystemExit(128 + (self.received or signal.SIGTERM))

    @contextlib.contextmanager
    def _set_deferred(self, value: bool) -> Iterator[None]:
        previous, self._is_deferred = self._is_deferred, value
        try:
            yield
        finally:
            self._is_deferred = previous

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if self.received is not None:
            return  # a job scheduler may send SIGTERM several times
        self.received = signal.Signals(signum)
        # A process that is slow to end, such as one that compiles, ends at a second Ctrl-C.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not self._is_deferred:
            self.exit()
