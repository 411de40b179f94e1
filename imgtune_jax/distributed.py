"""The start of a program that runs as several processes, usually one on each host."""

from __future__ import annotations

import logging
import os
import sys
import threading

import jax

from imgtune_jax.errors import UserError

TIMEOUT_SECONDS = 300.0


def initialize(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    *,
    timeout: float = TIMEOUT_SECONDS,
) -> None:
    """Connect this process with the others, before any computation; do nothing without arguments.

    `coordinator` is the address HOST:PORT at which process 0 listens, `processes` the number of
    processes, and `process` the number of this one, from 0. Afterwards, every line that a process
    other than 0 logs begins with its number.

    Raises UserError if only some of the arguments are given, or if they are invalid. If the
    processes have not connected after `timeout` seconds, this process ends with status 1, since
    JAX would abort it.
    """
    given = dict(coordinator=coordinator, processes=processes, process=process)
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if missing:
        raise UserError(
            f"{', '.join(missing)} not given; expected --coordinator=HOST:PORT, --processes=N and "
            "--process=I together, or none of them for a single process"
        )
    assert coordinator is not None and processes is not None and process is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator={coordinator}; expected HOST:PORT, the same on all hosts")
    if not 0 <= process < processes:
        raise UserError(
            f"--process={process} of --processes={processes}; expected 0 to {processes - 1}"
        )
    timer = threading.Timer(timeout, _exit, args=(coordinator, processes, process, timeout))
    timer.daemon = True
    timer.start()
    jax.distributed.initialize(
        coordinator, processes, process, initialization_timeout=round(2 * timeout) + 1
    )
    timer.cancel()
    if process:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(
                logging.Formatter(f"process {process}: %(levelname)s %(name)s: %(message)s")
            )


def _exit(coordinator: str, processes: int, process: int, timeout: float) -> None:
    print(
        f"imgtune: process {process} of {processes} waited {timeout:g} s for the others at "
        f"{coordinator}; check that all {processes} processes run, with different --process and "
        "the same --coordinator, and that the address is that of process 0's host",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
