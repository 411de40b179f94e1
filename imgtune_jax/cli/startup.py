"""Process-wide settings, and the reporting of user errors, for all commands."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from imgtune_jax.errors import UserError

# Folders that only the source checkout contains, not the wheel: {name: a path in a checkout}.
CHECKOUT_FOLDERS = {"configs": Path("configs/base.py"), "corpora": Path("corpora")}


def escape_unencodable_output() -> None:
    """Make the output streams escape characters that their encoding lacks, such as `\\u7ea2`.

    Otherwise, a caption in Chinese or a file name that is not UTF-8 could end a command.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def configure_process() -> None:
    """Set the log levels, and cache compiled programs on disk for later processes.

    The cache is `$JAX_COMPILATION_CACHE_DIR`, or imgtune_jax/xla in the user's cache folder.
    """
    import jax

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("imgtune_jax").setLevel(logging.INFO)
    logging.getLogger("jax").setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of every read-only folder
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "imgtune_jax" / "xla"
    jax.config.update(
        "jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(default))
    )


@contextlib.contextmanager
def report_user_errors() -> Iterator[None]:
    """Exit with the message of a user error. Every other exception keeps its traceback.

    With IMGTUNE_TRACEBACK=1 in the environment, all errors keep their traceback. If the reader of
    the output closes the pipe, as in `imgtune info DIR | head -1`, the process ends with status 0.
    Ctrl-C ends it with status 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # the status of a shell for a process ended by Ctrl-C
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except UserError as error:
        if os.environ.get("IMGTUNE_TRACEBACK"):
            raise
        message = with_checkout_hint(str(error))
        raise SystemExit(
            f"imgtune: {message}\n(set IMGTUNE_TRACEBACK=1 for the traceback)"
        ) from None


def with_checkout_hint(message: str) -> str:
    """Append a hint if `message` names a checkout folder that the current folder lacks."""
    missing = [
        f"{name}/"
        for name, path in CHECKOUT_FOLDERS.items()
        if _names_folder(message, name) and not path.exists()
    ]
    if not missing:
        return message
    return (
        f"{message}\n{' and '.join(missing)} not found in {Path.cwd()}: part of the source "
        "checkout of imgtune_jax, not of the installed package. Run the command in the checkout, "
        "or copy the folder here"
    )


def _names_folder(message: str, name: str) -> bool:
    """Whether a message contains a path in a folder of the current folder, or its module."""
    in_current = str(Path.cwd() / name) in message
    return in_current or re.search(rf"(?<![\w/.~-]){name}\b", message) is not None
