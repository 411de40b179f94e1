"""Captions, labels and groups, read from a record's JSON-like metadata; digests of sources."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgtune_jax.data.record import BadRecord, FaultCause, Record, group_id

FieldPath = tuple[str, ...]  # ("name", "en"): the keys from the outermost object inwards
MAX_SAMPLE_BYTES = 1 << 16  # a fingerprint reads at most this much of a sampled span


def as_field_path(value: str | Sequence[str]) -> FieldPath:
    """Return a field path; a string is a path of one key."""
    return (value,) if isinstance(value, str) else tuple(value)


def get_field(metadata: Any, path: FieldPath) -> Any:
    """Return the value at a path, or None if it is missing."""
    for key in path:
        if not isinstance(metadata, Mapping) or key not in metadata:
            return None
        metadata = metadata[key]
    return metadata


def parse_captions(value: Any) -> tuple[str, ...]:
    """Return the captions in a value: a string, a list of strings, or None.

    Blank strings are dropped. Raises BadRecord for any other value.
    """
    if value is None:
        return ()
    if isinstance(value, Mapping):
        raise BadRecord(
            FaultCause.BAD_METADATA,
            f"the caption is a group with the fields {', '.join(map(str, value))}; expected a "
            "string or a list of strings: add one of these fields to the path of the captions",
        )
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise BadRecord(
            FaultCause.BAD_METADATA,
            f"caption = {str(value)[:60]!r}; expected a string or a list of strings",
        )
    return tuple(v for v in values if v.strip())


def parse_label(value: Any, classes: Sequence[str] | None) -> int:
    """Return a class id: the value itself or, with `classes`, its index in `classes`.

    Raises BadRecord if the value is not an integer, or not one of `classes`.
    """
    if classes is not None and value in classes:
        return list(classes).index(value)
    if classes is None and isinstance(value, int) and not isinstance(value, bool):
        return value
    expected = "an integer" if classes is None else f"one of the {len(classes)} classes"
    raise BadRecord(FaultCause.MISSING_LABEL, f"label = {str(value)[:60]!r}; expected {expected}")


def parse_group(value: Any) -> int:
    """Return the id of a group. Raises BadRecord for None, the value of a missing field."""
    if value is None:
        raise BadRecord(FaultCause.BAD_METADATA, "the group field is missing")
    return group_id(value)


def decode_utf8(data: bytes, name: str) -> str:
    """Decode bytes as UTF-8. Raises BadRecord, with `name` in its text, if they are not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(FaultCause.BAD_UTF8, f"{name}: {error}") from error


def parse_json(data: bytes, name: str) -> Mapping[str, Any]:
    """Parse a JSON object. Raises BadRecord, with `name` in its text, if it is not one."""
    try:
        parsed = json.loads(decode_utf8(data, name))
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadRecord(FaultCause.BAD_METADATA, f"{name} is not JSON: {error}") from error
    if not isinstance(parsed, Mapping):
        raise BadRecord(
            FaultCause.BAD_METADATA, f"{name} = {str(parsed)[:40]!r}; expected a JSON object"
        )
    return parsed


def matches_filter(metadata: Any, where: Mapping[str, Sequence[Any]]) -> bool:
    """Return whether each top-level field in `where` has one of the values that `where` lists."""
    return all(get_field(metadata, (key,)) in values for key, values in where.items())


def as_int_if_digits(value: Any) -> Any:
    """Return "3" as 3, since csv files have no integers. Return any other value unchanged."""
    return int(value) if isinstance(value, str) and value.isdigit() else value


@dataclass(frozen=True)
class RecordFields:
    """Paths of captions (by caption set), label and group in the metadata of a source's records.

    `classes` is passed to `parse_label`. With `labels_from_digits` and no `classes`, the label "3"
    is read as the integer 3.
    """

    captions: Mapping[str, FieldPath]
    label: FieldPath | None = None
    classes: Sequence[str] | None = None
    group: FieldPath | None = None
    labels_from_digits: bool = False

    def build_record(
        self,
        key: str,
        *,
        image: Any,
        metadata: Mapping[str, Any],
        faults: Mapping[str, BadRecord],
        captions: Mapping[str, tuple[str, ...]] | None = None,
    ) -> Record:
        """Return the record whose captions, label and group are read from `metadata`.

        `captions`, if given, replace those of the metadata. Fields in `faults` are not read. A
        field that cannot be read is added to the faults of the record.
        """
        readers: dict[str, Callable[[], Any]] = {
            "captions": lambda: self._read_captions(metadata) if captions is None else captions,
            "label": lambda: self._read_label(metadata),
            "group": lambda: self._read_group(metadata),
        }
        values, all_faults = {}, dict(faults)
        for field, read_field in readers.items():
            if field in all_faults:
                continue
            try:
                values[field] = read_field()
            except BadRecord as bad:
                all_faults[field] = bad
        return Record(key, image, metadata=metadata, faults=all_faults, **values)

    def _read_captions(self, metadata: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        return {
            name: parse_captions(get_field(metadata, path)) for name, path in self.captions.items()
        }

    def _read_label(self, metadata: Mapping[str, Any]) -> int | None:
        if self.label is None:
            return None
        value = get_field(metadata, self.label)
        if self.labels_from_digits and self.classes is None:
            value = as_int_if_digits(value)
        return parse_label(value, self.classes)

    def _read_group(self, metadata: Mapping[str, Any]) -> int | None:
        return None if self.group is None else parse_group(get_field(metadata, self.group))


class Fingerprint:
    """Digest of the options and of the content of a source."""

    def __init__(self, *options: Any) -> None:
        self._hash = hashlib.sha256(repr(options).encode())

    def add(self, *values: Any) -> None:
        """Add values whose `repr` is the same in every process, such as names and sizes."""
        self._hash.update(repr(values).encode())

    def add_samples(self, path: Path, spans: Sequence[tuple[int, int]], samples: int = 16) -> None:
        """Add the bytes of about `samples` evenly spaced (offset, size) spans of a file."""
        sampled = spans[:: max(1, len(spans) // samples)]
        with path.open("rb") as file:
            for offset, size in sampled:
                file.seek(offset)
                self._hash.update(file.read(min(size, MAX_SAMPLE_BYTES)))

    def hex(self) -> str:
        """Return the digest, 32 hexadecimal digits."""
        return self._hash.hexdigest()[:32]
