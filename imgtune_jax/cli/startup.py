"""What every command does first, and how it ends on a mistake."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any


def configure_process() -> None:
    """Log what a person wants to read, and keep compiled programs between processes."""
    import jax

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("imgtune_jax").setLevel(logging.INFO)
    logging.getLogger("jax").setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of every read-only folder
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "imgtune_jax" / "xla"
    jax.config.update(
        "jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(default))
    )


class report_user_errors:
    """A user's mistake ends in one message, not in a traceback; anything else stays loud."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        from imgtune_jax.data import TooManyBadRecordsError
        from imgtune_jax.errors import NonFiniteLossError

        if isinstance(error, BrokenPipeError):  # the reader, `head` say, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        users = (
            ValueError,
            FileNotFoundError,
            FileExistsError,
            TooManyBadRecordsError,
            NonFiniteLossError,
        )
        if isinstance(error, users) and not os.environ.get("IMGTUNE_TRACEBACK"):
            raise SystemExit(f"imgtune: {error}\n(IMGTUNE_TRACEBACK=1 shows where)") from None
