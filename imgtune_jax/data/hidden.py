"""Which files of a folder or an archive are no data: hidden ones."""

from __future__ import annotations

from pathlib import PurePath


def is_hidden(path: str | PurePath) -> bool:
    """Return whether a part of a relative path begins with a dot, or is macOS's `__MACOSX`.

    Such files are made by other programs: .DS_Store, ._name, .ipynb_checkpoints.
    """
    parts = PurePath(path).parts
    return any(part.startswith(".") or part == "__MACOSX" for part in parts if part != "..")
