"""Images in a folder, with a table of captions or with one sub-folder per class."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from imgtune_jax.data import fingerprint as fingerprint_lib
from imgtune_jax.data.fingerprint import Fingerprint
from imgtune_jax.data.image import IMAGE_SUFFIXES
from imgtune_jax.data.record import BadRecord, FaultCause, Record
from imgtune_jax.data.record_fields import RecordFields, as_field_path, parse_json
from imgtune_jax.errors import UserError


class _TableRow(NamedTuple):
    """An image and its table columns. `fault` is set if a line of the table is bad."""

    file: str | None
    metadata: Mapping[str, Any]
    fault: BadRecord | None


@dataclass(frozen=True)
class Folder:
    """A folder of images.

    With `table` (.jsonl, .csv or .tsv; also open_clip's tab-separated .csv), each image in the
    column `image_column`, a path relative to `path`, is a record. Further lines with the same image
    add captions to it. `captions` maps caption sets to columns; the default is {"caption":
    "title"}. A .jsonl value may be a list of captions. `label` and `group` are columns, too.

    Without a table, each sub-folder is a class. The label of an image is the index of its class in
    `classes`, by default the sorted names of the sub-folders. The name of the class is the only
    caption; its caption set is "class".

    `fingerprint_mode` is "stat" or "content"; see `fingerprint.py`.
    """

    path: str
    table: str | None = None
    image_column: str = "filepath"
    captions: Mapping[str, str] | None = None
    label: str | None = None
    classes: Sequence[str] | None = None
    group: str | None = None
    fingerprint_mode: str = fingerprint_lib.STAT

    def __post_init__(self) -> None:
        fingerprint_lib.check_mode(self.fingerprint_mode)
        if not Path(self.path).is_dir():
            raise UserError(
                f"path = {self.path!r} is not a folder; set it to the folder of the images"
            )
        if self.table is not None and not Path(self.table).is_file():
            raise UserError(
                f"table = {self.table!r} does not exist; set it to a .jsonl, .csv or .tsv file"
            )
        if not len(self):
            raise UserError(f"no images in {self.path} (table={self.table})")

    def __len__(self) -> int:
        return len(self._image_rows)

    def __getitem__(self, index: int) -> Record:
        return self._build_record(index, with_image=True)

    def read_metadata(self, index: int) -> Record:
        """Return the record without its image."""
        return self._build_record(index, with_image=False)

    @property
    def caption_sets(self) -> tuple[str, ...]:
        """Names of the caption sets that records may have."""
        return ("class",) if self.table is None else tuple(self._caption_columns)

    @property
    def has_group(self) -> bool:
        """Whether records have a group."""
        return self.group is not None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        if self.classes is not None:
            return tuple(self.classes)
        return tuple(sorted(p.name for p in Path(self.path).iterdir() if p.is_dir()))

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the records, and of the size and modification time of each image."""
        if self.fingerprint_mode == fingerprint_lib.CONTENT:
            return self.listing_fingerprint
        return fingerprint_lib.with_file_stats(self.listing_fingerprint, self._image_files)

    @cached_property
    def listing_fingerprint(self) -> str:
        """Digest of options, table, file names, and the bytes of about 16 images.

        With the mode "content", of the bytes of all images.
        """
        digest = Fingerprint(self.image_column, self._caption_columns, self.label, self.classes)
        digest.add(self.group, self.class_names if self.table is None else ())
        for row in self._image_rows:
            digest.add(row.file, sorted(row.metadata.items(), key=str))
        files = self._image_files
        if self.fingerprint_mode == fingerprint_lib.STAT:
            files = fingerprint_lib.evenly_sampled(files)
        for file in files:
            digest.add_content(file)
        return digest.hex()

    @property
    def _image_files(self) -> Sequence[Path]:
        return [Path(self.path, row.file) for row in self._image_rows if row.file is not None]

    @property
    def _caption_columns(self) -> Mapping[str, str]:
        return {"caption": "title"} if self.captions is None else self.captions

    @cached_property
    def _record_fields(self) -> RecordFields:
        group = None if self.group is None else as_field_path(self.group)
        if self.table is None:
            path = ("class",)
            return RecordFields({"class": path}, path, self.class_names, group)
        return RecordFields(
            captions={
                name: as_field_path(column) for name, column in self._caption_columns.items()
            },
            label=None if self.label is None else as_field_path(self.label),
            classes=self.classes,
            group=group,
            labels_from_digits=True,
        )

    @cached_property
    def _image_rows(self) -> tuple[_TableRow, ...]:
        return self._rows_of_table() if self.table is not None else self._rows_of_classes()

    def _rows_of_classes(self) -> tuple[_TableRow, ...]:
        root = Path(self.path)
        files = (
            file
            for name in self.class_names
            for file in sorted((root / name).rglob("*"))
            if file.suffix.lower() in IMAGE_SUFFIXES
        )
        relative = (file.relative_to(root) for file in files)
        return tuple(_TableRow(str(f), {"class": f.parts[0]}, None) for f in relative)

    def _rows_of_table(self) -> tuple[_TableRow, ...]:
        """Return one row per image, with the captions of all its lines."""
        rows: dict[str, _TableRow] = {}
        for number, row in enumerate(_read_table(Path(str(self.table)))):
            file = row.metadata.get(self.image_column)
            name = file if isinstance(file, str) and file else None
            key = name or f"line {number}"
            if key in rows:
                row = _merge_captions(rows[key], row, tuple(self._caption_columns.values()))
            elif name is None and row.fault is None:
                columns = sorted(row.metadata)
                detail = f"line {number} has no {self.image_column!r}; its columns: {columns}"
                row = row._replace(fault=BadRecord(FaultCause.MISSING_IMAGE, detail))
            rows[key] = row._replace(file=name)
        return tuple(rows.values())

    def _build_record(self, index: int, *, with_image: bool) -> Record:
        row = self._image_rows[index]
        faults: dict[str, BadRecord] = {}
        if row.fault is not None:
            faults["image" if row.file is None else "captions"] = row.fault
        image = None
        if row.file is not None and with_image:
            try:
                image = Path(self.path, row.file).read_bytes()
            except OSError as error:
                faults["image"] = BadRecord(FaultCause.MISSING_IMAGE, str(error))
        key = row.file or f"{self.table}, {row.fault and row.fault.detail}"
        return self._record_fields.build_record(
            key, image=image, metadata=row.metadata, faults=faults
        )


def _merge_captions(old: _TableRow, new: _TableRow, columns: Sequence[str]) -> _TableRow:
    merged = dict(old.metadata)
    for column in columns:
        values = [old.metadata.get(column), new.metadata.get(column)]
        caption_lists = [[v] if isinstance(v, str) else list(v) for v in values if v]
        merged[column] = [caption for captions in caption_lists for caption in captions]
    return _TableRow(old.file, merged, old.fault or new.fault)


def _read_table(path: Path) -> list[_TableRow]:
    data = path.read_bytes()
    if path.suffix == ".jsonl":
        lines = [line for line in data.split(b"\n") if line.strip()]
        return [_parse_json_row(line, f"{path.name} line {n + 1}") for n, line in enumerate(lines)]
    if path.suffix not in (".csv", ".tsv"):
        raise UserError(f"table = {str(path)!r}; expected a .jsonl, .csv or .tsv file")
    # Invalid bytes become surrogates, so that _parse_csv_row can reject single rows.
    text = data.decode("utf-8-sig", errors="surrogateescape")
    header = text.partition("\n")[0]
    has_tabs = path.suffix == ".tsv" or "\t" in header  # open_clip's .csv files have tabs
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if has_tabs else ",")
    return [_parse_csv_row(row, f"{path.name} line {reader.line_num}") for row in reader]


def _parse_json_row(line: bytes, name: str) -> _TableRow:
    try:
        return _TableRow(None, parse_json(line, name), None)
    except BadRecord as bad:
        replaced = line.decode("utf-8", errors="replace")
        try:
            return _TableRow(None, dict(json.loads(replaced)), bad)
        except (ValueError, TypeError):
            return _TableRow(None, {}, bad)


def _parse_csv_row(row: Mapping[Any, Any], name: str) -> _TableRow:
    cells = {k: v for k, v in row.items() if isinstance(k, str) and isinstance(v, str)}
    try:
        for cell in cells.values():
            cell.encode("utf-8")
    except UnicodeEncodeError:
        return _TableRow(None, cells, BadRecord(FaultCause.BAD_UTF8, f"{name} is not UTF-8"))
    return _TableRow(None, cells, None)
