"""Images in a folder: with a table of captions, or a sub-folder a class."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from imgtune_jax.data import record_fields
from imgtune_jax.data.record import BadRecord, FaultCause, Record

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class _TableRow(NamedTuple):
    file: str | None
    metadata: Mapping[str, Any]
    fault: BadRecord | None


@dataclass(frozen=True)
class Folder:
    """A folder of images.

    With `table` (.jsonl, .csv or .tsv; open_clip's tab-separated .csv too), a record is an image
    of its `image_column`, a path relative to `path`; lines that name one image again add captions.
    captions: set -> column, by default "caption" -> "title". A jsonl value may be a list.
    Without it, each sub-folder is a class: the label is its place in the sorted names (or in
    `classes`), and its name is the caption of the set "class".
    """

    path: str
    table: str | None = None
    image_column: str = "filepath"
    captions: Mapping[str, str] | None = None
    label: str | None = None
    classes: Sequence[str] | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        if not Path(self.path).is_dir():
            raise ValueError(f"no folder at {self.path!r}; give the folder that holds the images")
        if self.table is not None and not Path(self.table).is_file():
            raise ValueError(f"no table at {self.table!r}; give a .jsonl, .csv or .tsv file")
        if not len(self):
            raise ValueError(f"no images in {self.path} (table={self.table})")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return self._record(index, with_image=True)

    def describe(self, index: int) -> Record:
        """The record without its image."""
        return self._record(index, with_image=False)

    @property
    def caption_sets(self) -> tuple[str, ...]:
        """The caption sets that records may have."""
        return ("class",) if self.table is None else tuple(self._columns)

    @property
    def has_group(self) -> bool:
        """Do records have a group?"""
        return self.group is not None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, by label."""
        if self.classes is not None:
            return tuple(self.classes)
        return tuple(sorted(p.name for p in Path(self.path).iterdir() if p.is_dir()))

    @cached_property
    def fingerprint(self) -> str:
        """Digest of options, table, file names and sizes, and the bytes of a few images."""
        digest = record_fields.Fingerprint(
            self.image_column, self._columns, self.label, self.classes
        )
        digest.add(self.group, self.class_names if self.table is None else ())
        present = []
        for row in self._rows:
            file = None if row.file is None else Path(self.path, row.file)
            size = file.stat().st_size if file is not None and file.is_file() else None
            digest.add(row.file, size, sorted(row.metadata.items(), key=str))
            if size is not None:
                present.append((file, size))
        for file, size in present[:: max(1, len(present) // 16)]:
            digest.add_samples(file, [(0, size)])
        return digest.hex()

    @property
    def _columns(self) -> Mapping[str, str]:
        return {"caption": "title"} if self.captions is None else self.captions

    @cached_property
    def _rows(self) -> tuple[_TableRow, ...]:
        return self._table_rows() if self.table is not None else self._class_rows()

    def _class_rows(self) -> tuple[_TableRow, ...]:
        root = Path(self.path)
        files = (
            file
            for name in self.class_names
            for file in sorted((root / name).rglob("*"))
            if file.suffix.lower() in IMAGE_SUFFIXES
        )
        relative = (file.relative_to(root) for file in files)
        return tuple(_TableRow(str(f), {"class": f.parts[0]}, None) for f in relative)

    def _table_rows(self) -> tuple[_TableRow, ...]:
        """One row an image, the captions of its lines joined."""
        rows: dict[str, _TableRow] = {}
        for number, row in enumerate(_read_table(Path(str(self.table)))):
            file = row.metadata.get(self.image_column)
            name = file if isinstance(file, str) and file else None
            key = name or f"line {number}"
            if key in rows:
                row = _merge(rows[key], row, tuple(self._columns.values()))
            elif name is None and row.fault is None:
                wanted = f"line {number} has no {self.image_column!r}: {sorted(row.metadata)}"
                row = row._replace(fault=BadRecord(FaultCause.MISSING_IMAGE, wanted))
            rows[key] = row._replace(file=name)
        return tuple(rows.values())

    def _record(self, index: int, *, with_image: bool) -> Record:
        row = self._rows[index]
        faults: dict[str, BadRecord] = {}
        image = None
        if row.fault is not None:
            faults["image" if row.file is None else "captions"] = row.fault
        if row.file is not None and with_image:
            try:
                image = Path(self.path, row.file).read_bytes()
            except OSError as error:
                faults["image"] = BadRecord(FaultCause.MISSING_IMAGE, str(error))
        columns = {"class": "class"} if self.table is None else self._columns
        captions: dict[str, tuple[str, ...]] = {}
        label = None
        try:
            captions = {
                s: record_fields.parse_captions(row.metadata.get(c)) for s, c in columns.items()
            }
        except BadRecord as bad:
            faults["captions"] = bad
        try:
            if self.table is None:
                label = self.class_names.index(row.metadata["class"])
            elif self.label is not None:
                label = record_fields.parse_label(
                    _parse_number(row.metadata.get(self.label)), self.classes
                )
        except BadRecord as bad:
            faults["label"] = bad
        group = None
        try:
            if self.group is not None:
                group = record_fields.parse_group(row.metadata.get(self.group))
        except BadRecord as bad:
            faults["group"] = bad
        key = row.file or f"{self.table}, {row.fault and row.fault.detail}"
        return Record(key, image, captions, label, group, row.metadata, faults)


def _merge(old: _TableRow, new: _TableRow, columns: Sequence[str]) -> _TableRow:
    joined = dict(old.metadata)
    for column in columns:
        both = [old.metadata.get(column), new.metadata.get(column)]
        lists = [[v] if isinstance(v, str) else list(v) for v in both if v]
        joined[column] = [text for texts in lists for text in texts]
    return _TableRow(old.file, joined, old.fault or new.fault)


def _parse_number(value: Any) -> Any:
    """A csv's "3" as 3."""
    return int(value) if isinstance(value, str) and value.isdigit() else value


def _read_table(path: Path) -> list[_TableRow]:
    data = path.read_bytes()
    if path.suffix == ".jsonl":
        lines = [line for line in data.split(b"\n") if line.strip()]
        return [_json_row(line, f"{path.name} line {n + 1}") for n, line in enumerate(lines)]
    if path.suffix not in (".csv", ".tsv"):
        raise ValueError(f"{path} is no .jsonl, .csv or .tsv")
    # A wrong byte spoils its own row only: it comes through as a surrogate, and is found there.
    text = data.decode("utf-8-sig", errors="surrogateescape")
    header = text.partition("\n")[0]
    tabs = path.suffix == ".tsv" or "\t" in header  # open_clip's .csv files have tabs
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",")
    return [_csv_row(row, f"{path.name} line {reader.line_num}") for row in reader]


def _json_row(line: bytes, where: str) -> _TableRow:
    try:
        return _TableRow(None, record_fields.parse_json(line, where), None)
    except BadRecord as bad:
        lenient = line.decode("utf-8", errors="replace")
        try:
            return _TableRow(None, dict(json.loads(lenient)), bad)
        except (ValueError, TypeError):
            return _TableRow(None, {}, bad)


def _csv_row(row: Mapping[Any, Any], where: str) -> _TableRow:
    cells = {k: v for k, v in row.items() if isinstance(k, str) and isinstance(v, str)}
    try:
        for cell in cells.values():
            cell.encode("utf-8")
    except UnicodeEncodeError:
        return _TableRow(None, cells, BadRecord(FaultCause.BAD_UTF8, f"{where} is not UTF-8"))
    return _TableRow(None, cells, None)
