"""Paths that users write: `~`, relative paths, and the config keys that hold paths."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

AUTO_CACHE = "auto"  # the value of config.cache.path that names the user's cache folder
# The keys of each source, by its name, that hold a path, a pattern or a list of them.
SOURCE_PATH_KEYS = {
    "webdataset": ("path",),
    "folder": ("path", "table"),
    "tfds": ("data_dir",),
}


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path in which a leading `~` or `~name` is replaced by a home folder."""
    return Path(os.path.expanduser(path))


def absolute_path(path: Any) -> Any:
    """Return a path or pattern, or each of a list, as an absolute path without `~`.

    None, an empty string and a URL are returned as they are.
    """
    if isinstance(path, list | tuple):
        return tuple(map(absolute_path, path))
    if not isinstance(path, str | Path) or not str(path) or "://" in str(path):
        return path
    given = user_path(path)
    if given.is_absolute() or os.path.lexists(given):
        return str(given.absolute())
    choices, closed, rest = str(given).partition("}")
    if choices.startswith("{") and closed and "," in choices:  # each choice may be absolute
        resolved = ",".join(absolute_path(choice) for choice in choices[1:].split(","))
        return f"{{{resolved}}}{rest}"
    folder = Path.cwd()
    return str(Path(glob.escape(str(folder)) if glob.has_magic(str(given)) else folder, given))


def absolute_source(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a source, `{"name": …, …}`, with absolute paths."""
    keys = SOURCE_PATH_KEYS.get(str(source.get("name")), ())
    return {k: absolute_path(v) if k in keys else v for k, v in source.items()}


def absolute_config(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config, as nested mappings, in which every path is absolute.

    Paths of sources, weights, tokenizer and feature cache are relative to the current folder. A
    path inside a pip package is unchanged. A run saves its config in this form, so that it reads
    the same files from any folder.
    """
    config = _absolute_sources(tree)
    for group in (*config["weights"].values(), config["tokenizer"], config["cache"]):
        is_auto = group is config["cache"] and group["path"] == AUTO_CACHE
        if "path" in group and "package" not in group and not is_auto:
            group["path"] = absolute_path(group["path"])
    return config


def _absolute_sources(tree: Any) -> Any:
    """Return a copy of a tree with absolute paths in each source, wherever it is."""
    if isinstance(tree, Mapping):
        return {k: _absolute_sources(v) for k, v in absolute_source(tree).items()}
    if isinstance(tree, list | tuple):
        return tuple(map(_absolute_sources, tree))
    return tree
