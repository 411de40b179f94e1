"""Recognition of files that are not weights, or are weights of a type that is not read."""

from __future__ import annotations

import re
from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec"
HDF5 = b"\x89HDF\r\n\x1a\n"
PAGES = (b"<!doctype", b"<html", b"<?xml")  # what a server sends instead of the file


def foreign_kind(path: Path) -> str | None:
    """Return what a file is and what to do about it, or None if it may be a file of weights."""
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip().lower()
    if head.startswith(LFS_POINTER):
        size = re.search(rb"^size (\d+)", head, re.MULTILINE)
        full = f" of {size[1].decode()} bytes" if size else ""
        return (
            f"a Git LFS pointer to a file{full}, not that file; run `git lfs pull` in the "
            "repository, or download the file itself"
        )
    if text.startswith(PAGES):
        return (
            "an HTML or XML page; download the file itself (on Hugging Face, its address contains "
            "/resolve/ instead of /blob/)"
        )
    if head.startswith(b"GGUF"):
        return "a GGUF file, which usually has quantized tensors; use the original safetensors file"
    if head.startswith(HDF5):
        return "an HDF5 file, as Keras writes; use the weights of PyTorch or safetensors"
    # A safetensors file has a binary length, and therefore zeros, before its JSON header.
    if text.startswith((b"{", b"[")) and b"\0" not in head[:8]:
        return "a JSON text; expected the file of weights to which it belongs"
    return None
