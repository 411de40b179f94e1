"""Errors written for users: each names what was given, what is expected and what to do.

The command line prints errors of the types in `cli.startup.USER_ERRORS`, such as `UserError`, as
one message without a traceback. All other exceptions keep their traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a config, a path, a data set or a call. Its message is the full explanation."""


class NonFiniteLossError(UserError, RuntimeError):
    """The training loss became NaN or infinite."""
