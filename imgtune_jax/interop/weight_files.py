"""Weight files: safetensors, npz without pickle, PyTorch; in a folder or in a pip package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from imgtune_jax.interop import torch_file
from imgtune_jax.interop.weight_map import flatten, unflatten
from imgtune_jax.types import Params


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays by name. Raises ValueError for a missing, unknown or broken file, or one with code."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no weights at {path}; give the path of a file")
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: want a {', '.join(_READERS)} file")
    try:
        return _READERS[path.suffix](path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # parsers raise anything on broken bytes
        raise ValueError(
            f"{path} cannot be read: {error} (it has {path.stat().st_size} bytes; compare with the "
            "original)"
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
    """Writes a parameter tree as safetensors; names are paths, 'image/blocks_0/attn/q/kernel'."""
    flat = {name: np.asarray(x, order="C") for name, x in flatten(params).items()}
    save_file(flat, Path(path), metadata=dict(metadata or {}))


def load_params(path: str | Path, part: str | None = None) -> Params:
    """What `save_params` wrote, or its sub-tree under `part`, such as "image" or "text/blocks_0".

    Raises ValueError if the file has nothing under `part`.
    """
    state = read_state_dict(path)
    if part is None:
        return unflatten(state)
    prefix = part.strip("/") + "/"
    inside = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
    if not inside:
        tops = sorted({name.partition("/")[0] for name in state})
        raise ValueError(f"{path} holds nothing under {part!r}; it has {', '.join(tops)}")
    return unflatten(inside)
