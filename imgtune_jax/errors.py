"""Errors written for users: each names what was given, what is expected and what to do.

The command line prints a `UserError` as one message, without a traceback. Every other exception is
a defect or a library's, and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a config, a path, a data set or a call. Its message is the whole explanation."""


class NonFiniteLossError(UserError, RuntimeError):
    """The training loss became NaN or infinite."""
