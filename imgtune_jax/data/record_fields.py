"""Captions, labels and groups, read from a record's JSON-like metadata."""

from __future__ import annotations

import codecs
import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from imgtune_jax.data.record import BadRecord, FaultCause, Record, group_id, printable

FieldPath = tuple[str, ...]  # ("name", "en"): the keys from the outermost object inwards
MAX_JSON_DEPTH = 64  # functions such as repr cannot process any depth
MAX_LABEL = 2**31 - 1
ENCODING_OF_MARK = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, whose mark is the beginning of this one
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}

# Python does not convert an integer of more than 4300 digits.
_JSON_DECODER = json.JSONDecoder(parse_int=lambda s: int(s) if len(s) < 1000 else float(s))


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


def with_field(metadata: Any, path: FieldPath, value: Any) -> Any:
    """Return a copy of `metadata` with `value` at a path; missing objects on the path are added."""
    if not path:
        return value
    fields = metadata if isinstance(metadata, Mapping) else {}
    return {**fields, path[0]: with_field(fields.get(path[0]), path[1:], value)}


def parse_captions(value: Any) -> tuple[str, ...]:
    """Return the captions in a value: a string, a list of strings, or None.

    Blank strings are dropped. Raises BadRecord for any other value, and for a string that is not
    Unicode text, such as half of a surrogate pair.
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
            f"caption = {reprlib.repr(value)}; expected a string or a list of strings",
        )
    for text in values:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRecord(
                FaultCause.BAD_UTF8, f"caption = {reprlib.repr(text)} is not UTF-8 ({error.reason})"
            ) from error
    return tuple(v for v in values if v.strip())


def parse_label(value: Any, classes: Sequence[str] | None) -> int:
    """Return a class id: the value itself or, with `classes`, its index in `classes`.

    Raises BadRecord if the value is not an integer from 0 to 2³¹ - 1, or not one of `classes`.
    """
    value = _as_python_scalar(value)
    if classes is not None and value in classes:
        return list(classes).index(value)
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if classes is None and is_int and 0 <= value <= MAX_LABEL:
        return value
    expected = (
        f"an integer from 0 to {MAX_LABEL}"
        if classes is None
        else f"one of the {len(classes)} classes"
    )
    raise BadRecord(FaultCause.MISSING_LABEL, f"label = {reprlib.repr(value)}; expected {expected}")


def parse_group(value: Any) -> int:
    """Return the id of a group.

    Raises BadRecord for None (the value of a missing field), for a blank string, and for NaN, since
    records without a group would all be in the same one.
    """
    value = _as_python_scalar(value)
    is_blank = isinstance(value, str) and not value.strip()
    if value is None or is_blank or (isinstance(value, float) and math.isnan(value)):
        raise BadRecord(FaultCause.BAD_METADATA, "the group field is missing or empty")
    return group_id(value)


def _as_python_scalar(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def split_mark(data: bytes) -> tuple[str, bytes]:
    """Return the encoding that a byte order mark states (default: UTF-8), and the other bytes."""
    for mark, encoding in ENCODING_OF_MARK.items():
        if data.startswith(mark):
            return encoding, data[len(mark) :]
    return "utf-8", data


def decode_text(data: bytes, name: str) -> str:
    """Decode UTF-8, or the encoding of the byte order mark. Raises BadRecord that names `name`."""
    encoding, data = split_mark(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise BadRecord(FaultCause.BAD_UTF8, f"{name}: {error}") from error


def load_json(text: str) -> Any:
    """Parse JSON. Raises ValueError if the text is not JSON, or is nested too deeply for Python.

    An integer with more digits than Python converts is a float, as in other JSON parsers.
    """
    try:
        return _JSON_DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error


def parse_json(data: bytes | str, name: str) -> Mapping[str, Any]:
    """Parse a JSON object. Raises BadRecord, with `name` in its text, if it is not one."""
    try:
        parsed = load_json(data if isinstance(data, str) else decode_text(data, name))
    except ValueError as error:
        raise BadRecord(FaultCause.BAD_METADATA, f"{name} is not JSON: {error}") from error
    return check_json_object(parsed, name)


def check_json_object(value: Any, name: str) -> Mapping[str, Any]:
    """Return a JSON object. Raises BadRecord if the value is another one, or deeply nested."""
    if not isinstance(value, Mapping):
        raise BadRecord(
            FaultCause.BAD_METADATA, f"{name} = {reprlib.repr(value)}; expected a JSON object"
        )
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        containers = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for values in containers for v in values if isinstance(v, dict | list)]
        if not level:
            return value
    raise BadRecord(
        FaultCause.BAD_METADATA, f"{name} is nested more than {MAX_JSON_DEPTH} levels deep"
    )


def matches_filter(metadata: Any, where: Mapping[str, Sequence[Any]]) -> bool:
    """Return whether each top-level field in `where` has one of the values that `where` lists."""
    return all(get_field(metadata, (key,)) in values for key, values in where.items())


def as_int_if_digits(value: Any) -> Any:
    """Return "3" as 3, since csv files have no integers. Return any other value unchanged."""
    is_digits = isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,18}\s*", value)
    return int(value) if is_digits else value


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
        return Record(printable(key), image, metadata=metadata, faults=all_faults, **values)

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
