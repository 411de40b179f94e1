"""Reading and writing weight files: safetensors, npz without pickle, PyTorch, and shards of these.

A model in shards has an index file, `*.index.json`, which maps each name to the file that has it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from imgtune_jax.errors import MissingFileError, UserError
from imgtune_jax.interop import file_kinds, torch_file
from imgtune_jax.param_tree import flatten, unflatten
from imgtune_jax.paths import user_path
from imgtune_jax.types import Params

INDEX_SUFFIX = ".index.json"
SHARD_NAME = re.compile(r"-(\d+)-of-(\d+)\.\w+$")
# Types in a safetensors header that NumPy and ml_dtypes represent without scales.
SAFETENSORS_TYPES = {
    *("F64", "F32", "F16", "BF16", "BOOL"),
    *("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"),
}


def find_weight_file(path: str | Path) -> Path:
    """Return `path`, or the only weight file of a folder; there, safetensors are preferred.

    For a model in shards, the weight file is the index. Raises MissingFileError without a file, and
    UserError listing the files if there are several.
    """
    path = user_path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise MissingFileError(f"no weights at {path}; expected the path of a file or a folder")
    files = sorted(f for f in path.iterdir() if f.is_file() and _is_weight_file(f))
    safetensors = [f for f in files if ".safetensors" in f.suffixes]
    candidates = safetensors or files
    if not candidates:
        raise MissingFileError(f"no weights in {path}; expected a file {', '.join(_READERS)}")
    if len(candidates) > 1:
        raise UserError(
            f"{path} has several weight files: {', '.join(f.name for f in candidates)}; give the "
            "path of one of them"
        )
    return candidates[0]


def _is_weight_file(path: Path) -> bool:
    """Whether a file is an index of shards or a full model, judging by its name."""
    if path.name.endswith(INDEX_SUFFIX):
        return True
    return path.suffix in _READERS and not SHARD_NAME.search(path.name)


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Return the arrays by name of a weight file, of an index of shards, or of a folder with one.

    Raises UserError if the file is missing, unreadable or of an unknown type, if shards are
    missing, or if reading it would run code.
    """
    path = find_weight_file(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    shard = SHARD_NAME.search(path.name)
    if shard and int(shard[2]) > 1:
        raise UserError(
            f"{path} is shard {int(shard[1])} of {int(shard[2])}; give the path of the index, "
            f"*{INDEX_SUFFIX}, or of the folder"
        )
    return _read_file(path)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises UserError if the file has no valid object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON and UTF-8
        raise UserError(f"{path} cannot be read as JSON: {error}; restore the file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}; expected an object")
    return content


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(s, str) for s in shard_of.values()):
        raise UserError(f"{index} has no weight_map; expected an index of shards")
    shards = sorted(set(shard_of.values()))
    outside = [name for name in shards if Path(name).name != name]
    if outside:
        raise UserError(f"{index} names {', '.join(outside)}; expected files in its own folder")
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise MissingFileError(
            f"{index} names {len(shards)} shards, of which {', '.join(missing)} are missing in "
            "its folder; download them too"
        )
    state: dict[str, np.ndarray] = {}
    for name in shards:
        state |= _read_file(index.parent / name)
    if absent := sorted(shard_of.keys() - state.keys()):
        raise UserError(
            f"{index} names {absent[0]} ({len(absent)} such tensors), which its shards do not "
            "have; download index and shards again, from one revision"
        )
    return state


def _read_file(path: Path) -> dict[str, np.ndarray]:
    if path.suffix not in _READERS:
        raise UserError(f"{path} is of an unknown type; expected {', '.join(_READERS)}")
    if (kind := file_kinds.foreign_kind(path)) is not None:
        raise UserError(f"{path} is not a file of weights, but {kind}")
    try:
        return _READERS[path.suffix](path)
    except (OSError, MemoryError):
        raise
    except UserError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # parsers raise arbitrary exceptions on invalid bytes
        raise UserError(
            f"{path} cannot be read: {error} (it has {path.stat().st_size} bytes; if the "
            "original has another size, download it again)"
        ) from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, framework="np") as file:
        types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        unread = {name: t for name, t in types.items() if t not in SAFETENSORS_TYPES}
        if unread:
            kinds = ", ".join(sorted(set(unread.values())))
            raise UserError(
                f"{len(unread)} of {len(types)} tensors have the type {kinds}, first "
                f"{min(unread)}; their values depend on scales that are not applied here; use "
                "weights in float32, float16 or bfloat16"
            )
        return file.get_tensors()


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    # NumPy saves bfloat16, which it does not know, as raw values of two bytes (big_vision#107).
    return {n: x.view(ml_dtypes.bfloat16) if x.dtype == "V2" else x for n, x in arrays.items()}


_READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pth": torch_file.load_state_dict,
    ".pt": torch_file.load_state_dict,
    ".bin": torch_file.load_state_dict,
    ".ckpt": torch_file.load_state_dict,
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
