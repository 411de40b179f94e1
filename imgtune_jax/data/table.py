"""Tables of images: .csv, .tsv, .jsonl or .json -> rows of named cells."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imgtune_jax.data.record import BadRecord, FaultCause
from imgtune_jax.data.record_fields import check_json_object, load_json, parse_json, split_mark
from imgtune_jax.errors import UserError

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
SEPARATORS = "\t,;|"  # if several fit a header equally well, the first one
MAX_CELL_SIZE = 2**31 - 1
MAX_NAMED_COLUMNS = 20  # an error names this many of the columns found


class TableRow(NamedTuple):
    """The cells of a row by column, and the name of the row in messages: file and line.

    The first line of a file is line 1, and a row begins at its first line. `fault` is set if the
    row is malformed.
    """

    name: str
    cells: Mapping[str, Any]
    fault: BadRecord | None = None


def read_table(path: Path, *, columns: Sequence[str]) -> list[TableRow]:
    """Return the rows of a table with `columns`.

    A .csv or .tsv file has a header, from which the separator is determined: tab, comma, semicolon
    or vertical bar. A .jsonl file has a JSON object per line, a .json file a list of objects or
    the same as .jsonl. The encoding is UTF-8, or that of the byte order mark. Bytes that are not
    UTF-8 become surrogates (`errors="surrogateescape"`), which the readers of a cell reject.

    Raises UserError if the table has no rows, a column is missing, or the format is another one.
    """
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise UserError(f"table = {str(path)!r}; expected a {', '.join(TABLE_SUFFIXES)} file")
    text = _read_text(path)
    if not text.strip():
        raise UserError(f"the table {path} is empty; expected a row per image")
    if path.suffix.lower() in (".csv", ".tsv"):
        return _parse_separated(text, path, columns)
    return _parse_json_rows(text, path, columns)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"the table {path} cannot be read: {error}") from error
    encoding, data = split_mark(data)
    beginning = data[:4096]
    if encoding == "utf-8" and beginning.count(0) > len(beginning) // 4:
        raise UserError(
            f"the table {path} is not UTF-8: it has zero bytes, as UTF-16 without a byte order "
            "mark; save it as UTF-8"
        )
    # Both error handlers let a single row be rejected, instead of the table.
    errors = "surrogateescape" if encoding == "utf-8" else "surrogatepass"
    try:
        return data.decode(encoding, errors)
    except UnicodeDecodeError as error:
        raise UserError(
            f"the table {path} begins with the byte order mark of {encoding}, but cannot be "
            f"decoded ({error}); save it as UTF-8"
        ) from error


def _check_columns(found: Sequence[str], wanted: Sequence[str], path: Path) -> None:
    missing = [column for column in dict.fromkeys(wanted) if column not in found]
    repeated = [column for column in dict.fromkeys(wanted) if found.count(column) > 1]
    if missing:
        more = f" and {len(found) - MAX_NAMED_COLUMNS} more" if found[MAX_NAMED_COLUMNS:] else ""
        raise UserError(
            f"the table {path} has no columns {missing}; it has {found[:MAX_NAMED_COLUMNS]}{more}. "
            "Set image_column, captions, label and group to the names of its columns"
        )
    if repeated:
        raise UserError(f"the table {path} has several columns {repeated}; rename all but one")


def _parse_separated(text: str, path: Path, columns: Sequence[str]) -> list[TableRow]:
    csv.field_size_limit(MAX_CELL_SIZE)  # Python's default would reject a long caption
    lines = list(io.StringIO(text, newline=""))  # splits at \n, \r and \r\n only
    first = next(i for i, line in enumerate(lines) if line.strip())
    separator, header = _parse_header(lines[first], columns)
    _check_columns(header, columns, path)
    rows = []
    for index, cells in _split_rows(lines, first + 1, separator, header=lines[first]):
        if any(cell.strip() for cell in cells):
            name = f"{path.name} line {index + 1}"
            rows.append(_build_row(name, cells, header, separator))
    if not rows:
        raise UserError(f"the table {path} has no rows after its header; expected a row per image")
    return rows


def _parse_header(line: str, columns: Sequence[str]) -> tuple[str, list[str]]:
    """Return the separator and the columns: those that contain the most of the wanted `columns`."""
    candidates = []
    for separator in SEPARATORS:
        cells = next(csv.reader([line], delimiter=separator, skipinitialspace=True))
        candidates.append((separator, [cell.strip() for cell in cells]))
    return max(candidates, key=lambda c: (len({*columns} & {*c[1]}), len(c[1])))


def _split_rows(
    lines: Sequence[str], start: int, separator: str, *, header: str
) -> Iterator[tuple[int, list[str]]]:
    """Yield (index of the first line, cells) of each row.

    A quoted cell may contain line ends. If the quotes of a row are not balanced, then its first
    line alone is a row, and its quotes are characters of the captions. So no other line is lost. In
    a table with tabs, a quoted cell that contains a whole row also counts as not balanced.
    """
    spaces = separator + " " in header
    tabs = header.count("\t") if separator == "\t" else None
    while start < len(lines):
        remaining = (lines[i] for i in range(start, len(lines)))
        reader = csv.reader(remaining, delimiter=separator, strict=True, skipinitialspace=spaces)
        first = start
        try:
            for cells in reader:
                end = start + reader.line_num
                if tabs and any(line.count("\t") == tabs for line in lines[first + 1 : end]):
                    raise csv.Error("a quoted cell contains a row")
                yield first, cells
                first = end
            return
        except csv.Error:
            yield first, lines[first].rstrip("\r\n").split(separator)
            start = first + 1


def _build_row(name: str, cells: Sequence[str], header: Sequence[str], separator: str) -> TableRow:
    fault = None
    if any(cell.strip() for cell in cells[len(header) :]):
        fault = BadRecord(
            FaultCause.BAD_METADATA,
            f"{name} has {len(cells)} cells, but the header has {len(header)}; put quotes around "
            f"a cell that contains {separator!r}",
        )
    return TableRow(name, dict(zip(header, cells, strict=False)), fault)


def _parse_json_rows(text: str, path: Path, columns: Sequence[str]) -> list[TableRow]:
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        rows = _parse_json_list(text, path)
    else:
        lines = enumerate(re.split(r"\r\n|\n|\r", text), start=1)
        rows = [
            _as_row(parse_json, line, f"{path.name} line {n}") for n, line in lines if line.strip()
        ]
    found = list(dict.fromkeys(column for row in rows for column in row.cells))
    if not found:
        detail = next((row.fault for row in rows if row.fault), "its list is empty")
        raise UserError(f"the table {path} has no JSON objects ({detail}); expected one per image")
    _check_columns(found, columns, path)
    return rows


def _parse_json_list(text: str, path: Path) -> list[TableRow]:
    try:
        values = load_json(text)
    except ValueError as error:
        raise UserError(f"the table {path} is not JSON: {error}") from error
    return [
        _as_row(check_json_object, value, f"{path.name} item {n}")
        for n, value in enumerate(values, start=1)
    ]


def _as_row(parse: Callable[[Any, str], Mapping[str, Any]], value: Any, name: str) -> TableRow:
    try:
        return TableRow(name, parse(value, name))
    except BadRecord as bad:
        return TableRow(name, {}, bad)
