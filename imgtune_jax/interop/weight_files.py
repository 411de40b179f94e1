"""Reading and writing weight files: safetensors, npz without pickle, and PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from imgtune_jax.errors import UserError
from imgtune_jax.interop import torch_file
from imgtune_jax.param_tree import flatten, unflatten
from imgtune_jax.paths import user_path
from imgtune_jax.types import Params


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Return a weight file's arrays by name.

    Raises UserError if the file is missing, unreadable or of an unknown type, or if reading it
    would run code.
    """
    path = user_path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}; expected the path of a file")
    if path.suffix not in _READERS:
        raise UserError(f"{path} is of an unknown type; expected {', '.join(_READERS)}")
    try:
        return _READERS[path.suffix](path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # parsers raise arbitrary exceptions on invalid bytes
        raise UserError(
            f"{path} cannot be read: {error} (it has {path.stat().st_size} bytes; if the "
            "original has another size, download it again)"
        ) from error


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


_READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".safetensors": load_file,
    ".npz": _read_npz,
    ".pth": torch_file.load_state_dict,
    ".pt": torch_file.load_state_dict,
    ".bin": torch_file.load_state_dict,
}


def save_params(params: Params, path: str | Path, *, metadata: Mapping[str, str] | None = None):
    """Write a parameter tree as safetensors, named by path: 'image/blocks_0/attn/q/kernel'."""
    flat = {name: np.asarray(x, order="C") for name, x in flatten(params).items()}
    save_file(flat, user_path(path), metadata=dict(metadata or {}))


def load_params(path: str | Path, subtree: str | None = None) -> Params:
    """Return the tree that `save_params` wrote, or its subtree at a path such as "image/blocks_0".

    Raises UserError if the file has no parameter in `subtree`.
    """
    state = read_state_dict(path)
    if subtree is None:
        return unflatten(state)
    prefix = subtree.strip("/") + "/"
    flat = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
    if not flat:
        roots = ", ".join(sorted({name.partition("/")[0] for name in state}))
        raise UserError(
            f"{path} has no parameter in subtree = {subtree!r}; expected a path in one of: {roots}"
        )
    return unflatten(flat)
