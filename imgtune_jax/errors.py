"""Errors written for users: each names what was given, what is expected and what to do.

The command line prints a `UserError` as one message without a traceback. All other exceptions,
such as a library's ValueError, keep their traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in a config, a path, a data set or a call. Its message is the full explanation."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that does not exist."""


class ExistingFileError(UserError, FileExistsError):
    """A file or folder that must not exist yet."""


class NonFiniteLossError(UserError, RuntimeError):
    """The training loss became NaN or infinite."""


class NonFiniteParamsError(UserError, RuntimeError):
    """Parameters, their moving average or the optimizer state became NaN or infinite."""


class DiskFullError(UserError):
    """A file that cannot be written, because the disk or the user's quota is full."""
