"""Reading captions, labels and groups out of a record's JSON-like metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imgtune_jax.data.record import BadRecord, FaultCause, group_id

FieldPath = tuple[str, ...]  # ("name", "en"): the keys from the outermost object inwards


def as_field_path(value: str | Sequence[str]) -> FieldPath:
    """A field path; a single name may be given as a string."""
    return (value,) if isinstance(value, str) else tuple(value)


def get_field(metadata: Any, path: FieldPath) -> Any:
    """What lies at a path, or None."""
    for key in path:
        if not isinstance(metadata, Mapping) or key not in metadata:
            return None
        metadata = metadata[key]
    return metadata


def parse_captions(value: Any) -> tuple[str, ...]:
    """Caption alternatives of a value: a string, a list of strings, or None. Empty ones go."""
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise BadRecord(
            FaultCause.BAD_METADATA,
            f"caption {str(value)[:60]!r}; wanted a string or a list of strings",
        )
    return tuple(v for v in values if v.strip())


def parse_label(value: Any, classes: Sequence[str] | None) -> int:
    """A class id: an integer as it is, a name by its place in `classes`."""
    if classes is not None and value in classes:
        return list(classes).index(value)
    if classes is None and isinstance(value, int) and not isinstance(value, bool):
        return value
    wanted = "an integer" if classes is None else f"one of the {len(classes)} classes"
    raise BadRecord(FaultCause.MISSING_LABEL, f"label {str(value)[:60]!r}; wanted {wanted}")


def parse_group(value: Any) -> int:
    """A group's id. Raises BadRecord for a record that names none."""
    if value is None:
        raise BadRecord(FaultCause.BAD_METADATA, "the field that names the group is not there")
    return group_id(value)


def decode_utf8(data: bytes, what: str) -> str:
    """Text of bytes. Raises BadRecord."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(FaultCause.BAD_UTF8, f"{what}: {error}") from error


def parse_json(data: bytes, what: str) -> Mapping[str, Any]:
    """A JSON object. Raises BadRecord."""
    try:
        parsed = json.loads(decode_utf8(data, what))
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadRecord(FaultCause.BAD_METADATA, f"{what} is not JSON: {error}") from error
    if not isinstance(parsed, Mapping):
        raise BadRecord(
            FaultCause.BAD_METADATA, f"{what} is no JSON object, but {str(parsed)[:40]!r}"
        )
    return parsed


def matches_filter(metadata: Any, where: Mapping[str, Sequence[Any]]) -> bool:
    """Does every top-level field of `where` have one of its values?"""
    return all(get_field(metadata, (key,)) in values for key, values in where.items())


class Fingerprint:
    """Collects what a source's records are, for its fingerprint."""

    def __init__(self, *options: Any) -> None:
        self._hash = hashlib.sha256(repr(options).encode())

    def add(self, *values: Any) -> None:
        """Mix in names and sizes."""
        self._hash.update(repr(values).encode())

    def add_samples(self, path: Path, spans: Sequence[tuple[int, int]], samples: int = 16) -> None:
        """Mix in some of a file's (offset, size) spans, evenly chosen."""
        chosen = spans[:: max(1, len(spans) // samples)]
        with path.open("rb") as file:
            for offset, size in chosen:
                file.seek(offset)
                self._hash.update(file.read(min(size, 1 << 16)))

    def hex(self) -> str:
        """The digest."""
        return self._hash.hexdigest()[:32]
