"""JSON Lines files (.jsonl): one JSON object per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from imgtune_jax.errors import UserError


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects in a file, in order; an empty list if the file does not exist.

    Only a line feed ends a line, since a JSON string may contain other line separators (U+2028). A
    last line without a line feed is skipped if it is incomplete, as in the log of an active run.
    Raises UserError for any other line that is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    *lines, unfinished = path.read_text("utf-8").split("\n")
    records = [_parse_line(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    try:
        return [*records, _parse_line(path, len(lines) + 1, unfinished)]
    except UserError:
        return records


def _parse_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number} is not JSON: {line[:80]!r}") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}, line {number} is {line[:80]!r}; expected a JSON object")
    return record
