"""Images in a folder, with a table of captions or with one sub-folder per class."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from imgtune_jax.data import fingerprint as fingerprint_lib
from imgtune_jax.data.fingerprint import Fingerprint
from imgtune_jax.data.hidden import is_hidden
from imgtune_jax.data.image import IMAGE_SUFFIXES, MAX_FILE_BYTES, read_image_file
from imgtune_jax.data.record import BadRecord, FaultCause, Record
from imgtune_jax.data.record_fields import (
    RecordFields,
    as_field_path,
    get_field,
    parse_captions,
    with_field,
)
from imgtune_jax.data.table import TableRow, read_table
from imgtune_jax.errors import UserError

log = logging.getLogger("imgtune_jax.data")
MAX_NAMED = 5  # a warning names this many folders


class _ImageRow(NamedTuple):
    """An image, by its path in the table, and its metadata.

    `file` is None if the table has no path, and `name` names the row in messages. `faults` maps the
    fields of the record that cannot be used to the reason.
    """

    name: str
    file: str | None
    metadata: Mapping[str, Any]
    faults: Mapping[str, BadRecord]


@dataclass(frozen=True)
class Folder:
    """A folder of images.

    With `table` (.csv, .tsv, .jsonl or .json; see `read_table`), each image in the column
    `image_column` is a record. Further lines with the same image add captions to it. `captions`
    maps caption sets to columns; the default is {"caption": "title"}. A JSON value may be a list of
    captions. `label` and `group` are columns, too.

    The paths in a table are relative to `path`, or absolute and inside of it. A path that leaves
    `path` makes a bad record. So path="/" admits all absolute paths, and path="." reads paths as
    open_clip does, relative to the working directory.

    Without a table, each sub-folder is a class. The label of an image is the index of its class in
    `classes`, by default the sorted names of the sub-folders. The name of the class is the only
    caption; its caption set is "class". Hidden files and folders are skipped.

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
        if self.table is None:
            self._check_class_folders()
        elif not Path(self.table).is_file():
            raise UserError(
                f"table = {self.table!r} does not exist; set it to a .jsonl, .json, .csv or .tsv "
                "file"
            )
        elif all("image" in row.faults for row in self._image_rows):
            fault = self._image_rows[0].faults["image"]
            raise UserError(f"the table {self.table} has no image that can be read: {fault.detail}")

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
        """Names of the classes, in the order of the labels; () if the table has the labels."""
        if self.classes is not None or self.table is not None:
            return tuple(self.classes or ())
        return self._sub_folders

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
            digest.add_content(file, max_bytes=MAX_FILE_BYTES)
        return digest.hex()

    @property
    def _image_files(self) -> Sequence[Path]:
        """Files of the images; not those outside of `path`, which are never read."""
        rows = (row for row in self._image_rows if "image" not in row.faults)
        return [_locate(self.path, str(row.file)) for row in rows]

    @property
    def _caption_columns(self) -> Mapping[str, str]:
        return {"caption": "title"} if self.captions is None else self.captions

    @property
    def _sub_folders(self) -> tuple[str, ...]:
        folders = (p.name for p in Path(self.path).iterdir() if p.is_dir())
        return tuple(sorted(name for name in folders if not is_hidden(name)))

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
    def _image_rows(self) -> tuple[_ImageRow, ...]:
        return self._rows_of_table() if self.table is not None else self._rows_of_classes()

    def _rows_of_classes(self) -> tuple[_ImageRow, ...]:
        files = (file for name in self.class_names for file in _list_images(self.path, name))
        return tuple(_ImageRow(str(f), str(f), {"class": f.parts[0]}, {}) for f in files)

    def _check_class_folders(self) -> None:
        """Raise UserError if no class has images, and warn of a layout that may be a mistake."""
        names = [path.name for path in Path(self.path).iterdir() if not path.is_dir()]
        at_top = [n for n in names if Path(n).suffix.lower() in IMAGE_SUFFIXES and not is_hidden(n)]
        counts = Counter(row.metadata["class"] for row in self._image_rows)
        deeper = [row.name for row in self._image_rows if len(Path(row.name).parts) > 2]
        unused = sorted({*self._sub_folders} - {*self.class_names})
        facts = {
            "images beside the sub-folders, which have no class and are not used": at_top,
            "classes without images": [c for c in self.class_names if not counts[c]],
            "sub-folders that are not in `classes`, and are not used": unused,
            "images in folders inside of a class; their class is the outermost folder": deeper,
            "the only class, so all labels and captions are equal": (
                list(counts) if len(counts) == 1 else []
            ),
        }
        lines = [f"{k} ({len(v)}): {', '.join(v[:MAX_NAMED])}" for k, v in facts.items() if v]
        if not counts:
            raise UserError(
                f"no images in {self.path}: expected a sub-folder of images per class, or a table. "
                + "; ".join(lines)
            )
        for line in lines:
            log.warning("%s: %s", self.path, line)

    def _rows_of_table(self) -> tuple[_ImageRow, ...]:
        """Return one row per image, with the captions of all its lines."""
        fields = (self.image_column, *self._caption_columns.values(), self.label, self.group)
        columns = [as_field_path(field)[0] for field in fields if field is not None]
        rows: dict[tuple[bool, str], _ImageRow] = {}
        for line in read_table(Path(str(self.table)), columns=columns):
            row = self._row_of_line(line)
            key = row.file is None, row.name
            rows[key] = self._merge(rows[key], line) if key in rows else row
        return tuple(rows.values())

    def _row_of_line(self, line: TableRow) -> _ImageRow:
        file = line.cells.get(self.image_column)
        if not isinstance(file, str) or not file.strip():
            detail = f"{line.name} has no {self.image_column!r}; its columns: {sorted(line.cells)}"
            fault = line.fault or BadRecord(FaultCause.MISSING_IMAGE, detail)
            return _ImageRow(line.name, None, line.cells, {"image": fault})
        faults = {} if line.fault is None else {"captions": line.fault}
        if _is_outside(self.path, file):
            faults["image"] = BadRecord(
                FaultCause.UNREADABLE_FILE,
                f"{line.name}: {file!r} is outside of path = {self.path!r}; set path to a folder "
                "that contains all images",
            )
        return _ImageRow(file, file, line.cells, faults)

    def _merge(self, row: _ImageRow, line: TableRow) -> _ImageRow:
        """Add the captions of a further line to the row of an image."""
        metadata, faults = dict(row.metadata), dict(row.faults)
        if line.fault is not None:
            faults.setdefault("captions", line.fault)
        for path in {as_field_path(column): None for column in self._caption_columns.values()}:
            try:
                old, new = (parse_captions(get_field(m, path)) for m in (metadata, line.cells))
                metadata = with_field(metadata, path, [*old, *new])
            except BadRecord as bad:
                faults.setdefault("captions", bad)
        for field, column in (("label", self.label), ("group", self.group)):
            path = as_field_path(column or ())
            old, new = (get_field(m, path) for m in (row.metadata, line.cells))
            if column is not None and old != new:
                detail = f"{line.name}: {field} = {new!r} of an image with {field} = {old!r} above"
                faults.setdefault(field, BadRecord(FaultCause.BAD_METADATA, detail))
        return row._replace(metadata=metadata, faults=faults)

    def _build_record(self, index: int, *, with_image: bool) -> Record:
        row = self._image_rows[index]
        faults, image = dict(row.faults), None
        if row.file is not None and with_image and "image" not in faults:
            try:
                image = read_image_file(_locate(self.path, row.file))
            except BadRecord as bad:
                faults["image"] = bad
        return self._record_fields.build_record(
            row.name, image=image, metadata=row.metadata, faults=faults
        )


def _list_images(root: str, folder: str) -> list[Path]:
    """Return the images in a folder of `root` and in its sub-folders, relative to `root`, sorted.

    Raises UserError if a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"a folder of images cannot be read: {error}") from error

    if not Path(root, folder).is_dir():
        return []
    files = (
        Path(parent, name).relative_to(root)
        for parent, _, names in os.walk(Path(root, folder), onerror=fail)
        for name in names
    )
    return sorted(f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(f))


def _locate(folder: str, file: str) -> Path:
    """Return the path of a file in a folder; `..` is resolved by name, not by symbolic links."""
    return Path(os.path.normpath(os.path.join(folder, file)))


def _is_outside(folder: str, file: str) -> bool:
    if not os.path.isabs(file) and ".." not in file:
        return False
    root = os.path.abspath(folder)
    return os.path.commonpath((root, os.path.abspath(_locate(folder, file)))) != root
