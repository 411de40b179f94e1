"""The table of sources by name, and the function that builds a source from its config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from imgtune_jax.data.folder import Folder
from imgtune_jax.data.mixture import Mixture
from imgtune_jax.data.record import Source
from imgtune_jax.data.tfds import TFDS
from imgtune_jax.data.webdataset import WebDataset
from imgtune_jax.errors import UserError
from imgtune_jax.paths import absolute_source

SOURCES: dict[str, type] = {
    "webdataset": WebDataset,
    "folder": Folder,
    "tfds": TFDS,
    "mixture": Mixture,
}


def build_source(config: Mapping[str, Any]) -> Source:
    """Build a source from `{"name": "webdataset", "path": …}`.

    Relative paths are relative to the current folder, and `~` is the home folder. The `sources` of
    a mixture are such mappings too. Raises UserError for an unknown name or field, and for a path
    that does not exist.
    """
    values = absolute_source(config)
    name = values.pop("name", None)
    if name not in SOURCES:
        raise UserError(f"source {name!r} is unknown; known: {', '.join(SOURCES)}")
    source_class = SOURCES[name]
    known = [f.name for f in dataclasses.fields(source_class)]
    if unknown := sorted(set(values) - set(known)):
        raise UserError(f"source {name!r} has no fields {unknown}; it has {', '.join(known)}")
    if name == "mixture":
        values["sources"] = tuple(build_source(s) for s in values.get("sources", ()))
    try:
        return source_class(**values)
    except TypeError as error:
        raise UserError(f"source {name!r}: {error}") from error
