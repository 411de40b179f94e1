"""Flags `--config=FILE` and `--config.KEY=VALUE`, parsed by absl and ml_collections."""

from __future__ import annotations

import difflib
import functools
import operator
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from imgtune_jax.errors import MissingFileError, UserError

UNITS = {"steps", "epochs", "examples"}  # a group with these keys is a duration
# Errors of absl and ml_collections, and of a config file whose line is unknown.
LOAD_ERRORS = (
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
)


def parse_flags(
    values: Any,
    arguments: list[str],
    *,
    required: Sequence[str] = (),
    switches: Sequence[str] = (),
) -> list[str]:
    """Set `values.config`, `values.workdir` and `switches`; return the remaining arguments.

    `values` is an absl FlagValues. `--config.KEY=None` unsets a key, and a duration in one unit
    unsets its other units. Raises UserError for an unknown config file or key, for an invalid
    value, and for an error in the config file.
    """
    from absl import flags
    from ml_collections import config_flags

    arguments = _joined(arguments)
    path = _config_path(arguments)
    _check_config_file(path)
    # With this path, a config can import its neighbors (`from configs import base`).
    sys.path[:0] = [str(Path.cwd()), str(path.resolve().parent.parent)]
    settings = dict(_settings(arguments))
    unset = [key for key, value in settings.items() if value == "None"]
    kept = [a for a in arguments if not any(v == "None" for _, v in _settings([a]))]
    config_help = "the experiment, such as configs/lit_emoji.py"
    config_flags.DEFINE_config_file("config", None, config_help, flag_values=values, sys_argv=kept)
    flags.DEFINE_string("workdir", None, "the run's folder; a run in it is resumed", values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0", values)
    flags.DEFINE_integer("processes", None, "number of processes", flag_values=values)
    flags.DEFINE_integer("process", None, "its number, from 0", flag_values=values)
    for name in switches:
        flags.DEFINE_bool(name, False, "see the command's --help", values)
    flags.mark_flags_as_required(list(required), values)
    try:
        remaining = values(kept)
        _check_loaded(values.config, path)
        _unset_keys(values.config, unset)
        _unset_other_units(values.config, [key for key in settings if key not in unset])
    except UserError:
        raise
    except Exception as error:
        message = _error_in_config(error, path)
        if message is None and not isinstance(error, (flags.Error, *LOAD_ERRORS)):
            raise
        raise UserError(message or _one_line(error, path)) from error
    return remaining


def _joined(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with `--config… value` as `--config…=value`, and `~` expanded."""
    joined: list[str] = []
    for argument in arguments:
        lacks_value = joined and re.fullmatch(r"--?config(\.[^=]+)?", joined[-1])
        if lacks_value and not argument.startswith("-"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    pattern = re.compile(r"--?config=(.*)")
    return [
        f"--config={os.path.expanduser(m[1])}" if (m := pattern.match(a)) else a for a in joined
    ]


def _config_path(arguments: Sequence[str]) -> Path:
    """Return the path in the last flag --config=PATH[:ARG]."""
    given = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    if not given or not given[-1]:
        raise UserError("no config is given; expected --config=FILE.py")
    return Path(given[-1].partition(":")[0])


def _check_config_file(path: Path) -> None:
    """Raise UserError if there is no such file, naming one with a similar path."""
    if path.is_file():
        return
    folders = dict.fromkeys([path.parent, Path("configs")])
    known = [str(p) for folder in folders for p in sorted(folder.glob("*.py"))]
    close = difflib.get_close_matches(str(path), known, n=1)
    hint = f"did you mean {close[0]}?" if close else "expected a Python file with get_config"
    raise MissingFileError(f"no config at {str(path)!r}; {hint}")


def _settings(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of each `--config.KEY=VALUE`."""
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if match := re.fullmatch(r"--?(?:no)?config\.(.+)", flag):
            yield match[1], value


def _check_loaded(config: Any, path: Path) -> None:
    from ml_collections import ConfigDict

    if not isinstance(config, ConfigDict):
        # The object that stands for a config file that raised an OSError raises it here.
        getattr(config, "keys", None)
        raise UserError(
            f"get_config of {path} returned {type(config).__name__}; expected a ConfigDict"
        )


def _group_and_name(config: Any, key: str) -> tuple[Any, str]:
    """Return the group that contains a dotted key, and the last part of the key."""
    from ml_collections import ConfigDict
    from ml_collections.config_flags import config_path

    *parents, name = config_path.split(key)
    group = functools.reduce(operator.getitem, parents, config)
    if not isinstance(group, ConfigDict):
        raise UserError(f"config.{key} is not a key of a group; change it in the config file")
    return group, name


def _unset_keys(config: Any, keys: Sequence[str]) -> None:
    """Set each key to None. A group becomes empty, and a duration means never."""
    from ml_collections import ConfigDict

    for key in keys:
        group, name = _group_and_name(config, key)
        value: Any = group[name]  # for an unknown key, the error names a similar one
        if isinstance(value, ConfigDict):
            empty = dict.fromkeys(UNITS) if set(value) == UNITS else {}
        else:
            empty = None
        with group.ignore_type():
            group[name] = empty


def _unset_other_units(config: Any, keys: Sequence[str]) -> None:
    """Set the units of a duration to None that the flags `keys` do not set, if they set one."""
    for key in keys:
        prefix, _, unit = key.rpartition(".")
        if unit not in UNITS:
            continue
        group, _ = _group_and_name(config, key)
        if set(group) == UNITS:
            with group.ignore_type():
                group.update({u: None for u in UNITS if f"{prefix}.{u}" not in keys})


def _error_in_config(error: BaseException, path: Path) -> str | None:
    """Return the message and line of an error that a config file or its neighbor raised."""
    chained: BaseException | None = error
    while chained is not None:
        frames = [
            frame
            for frame in traceback.extract_tb(chained.__traceback__)
            if Path(frame.filename).resolve().parent == path.resolve().parent
        ]
        if frames:
            file, line = frames[-1].filename, frames[-1].lineno
            return f"{file}, line {line}: {type(chained).__name__}: {chained}"
        chained = chained.__cause__ or chained.__context__
    return None


def _one_line(error: Exception, path: Path) -> str:
    """Return the error's message on one line.

    For an unknown key, ml_collections raises a KeyError, or another error that contains one.
    """
    if "has no attribute 'get_config'" in str(error):
        return f"{path} has no function get_config; expected one that returns a ConfigDict"
    if "Error whilst parsing config file" in str(error):  # followed by a traceback
        return f"{path}: " + str(error).strip().split("\n")[-1]
    cause = error.args[0] if error.args and isinstance(error.args[0], KeyError) else error
    message = f"no setting {cause.args[0]}" if isinstance(cause, KeyError) else str(error)
    return " ".join(message.split())
