"""PyTorch state dicts (`.pth`, `.pt`) as NumPy arrays, without PyTorch and without running code.

Reads the zip format (PyTorch ≥ 1.6) and the legacy format: five pickles, then raw storages.
"""

from __future__ import annotations

import collections
import io
import logging
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from imgtune_jax.errors import UserError

# Name of a PyTorch storage class -> dtype of its elements.
STORAGES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Entries of a checkpoint that hold the state dict, in order of preference: trained parameters come
# before their moving averages.
WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "module", "net"),
    *("ema", "ema_state_dict", "state_dict_ema", "model_ema"),
)
# Classes of settings and counters in checkpoints. Their instances are read as `_Ignored`.
IGNORED_CLASSES = {
    *(("argparse", "Namespace"), ("_codecs", "encode")),
    *(("collections", "Counter"), ("collections", "defaultdict")),
    *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
    *((module, "PurePosixPath") for module in ("pathlib", "pathlib._local")),
    *(("builtins", name) for name in ("int", "float", "set")),
    *(("__builtin__", name) for name in ("int", "long", "float", "set")),  # as Python 2 names them
    *((f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")),
    ("numpy", "dtype"),
    *(("torch", name) for name in ("Size", "device", "float16", "float32", "bfloat16")),
}
# Functions that rebuild tensors which NumPy cannot represent.
UNREADABLE_TENSORS = {
    "_rebuild_tensor_v3": "of a type that NumPy lacks, such as float8",
    "_rebuild_qtensor": "that are quantized",
    "_rebuild_sparse_tensor": "that are sparse",
}
# The files of a zip may add up to this multiple of its size: PyTorch does not compress them.
MAX_EXPANSION = 10

log = logging.getLogger("imgtune_jax.interop")


class RefusedPickleError(UserError, pickle.UnpicklingError):
    """A pickle that refers to anything but tensors and plain data."""


class _Ignored:
    """An object of another class, of which nothing is kept."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


class _LazyTensor(NamedTuple):
    """A view of a storage that is not read yet. Offset and stride are in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild_tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> _LazyTensor:
    """Replace the functions of torch._utils that rebuild a tensor."""
    return _LazyTensor(storage, offset, tuple(size), tuple(stride))


def _rebuild_parameter(data: _LazyTensor, *_: Any) -> _LazyTensor:
    """Replace the function of torch._utils that rebuilds a parameter."""
    return data


class _Unpickler(pickle.Unpickler):
    """An unpickler of tensors and plain data. It calls no function of another module.

    Objects of IGNORED_CLASSES are read as `_Ignored`. All other globals are refused.
    """

    ALLOWED: dict[tuple[str, str], Any] = {  # noqa: RUF012 - the class is not a dataclass
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    }

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) in self.ALLOWED:
            return self.ALLOWED[module, name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if (module, name) in IGNORED_CLASSES:
            return _Ignored
        if module == "torch._utils" and name in UNREADABLE_TENSORS:
            raise RefusedPickleError(
                f"it has tensors {UNREADABLE_TENSORS[name]}; save them as float32, float16 or "
                "bfloat16"
            )
        raise RefusedPickleError(
            f"refused to load {module}.{name}: a state dict holds tensors only; save the model's "
            "state_dict(), or convert the file to safetensors"
        )

    def persistent_load(self, pid: Any, /) -> _Storage:
        # ("storage", type, key, location, number of elements[, view])
        if not isinstance(pid, tuple) or pid[0] != "storage" or not isinstance(pid[1], np.dtype):
            raise RefusedPickleError(f"refused the persistent id {pid!r}; expected a storage")
        return self.storages.setdefault(str(pid[2]), _Storage(str(pid[2]), pid[1]))


def load_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Return the file's tensors by name, as read-only arrays.

    In a checkpoint, the state dict is one of the entries WRAPPERS, whose name is logged. Raises
    RefusedPickleError if the file refers to anything but tensors and plain data, and UserError if
    it has no state dict.
    """
    raw = Path(path).read_bytes()
    content = _unwrap(_read_zip(raw) if raw[:2] == b"PK" else _read_legacy(raw), path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected a state dict")
    arrays = {str(k): v for k, v in content.items() if isinstance(v, np.ndarray)}
    if not arrays:
        raise UserError(
            f"{path} holds a dict without tensors, with the keys {_first(content)}; expected a "
            f"state dict, or a checkpoint with one of {', '.join(WRAPPERS)}"
        )
    return arrays


def _unwrap(content: Any, path: str | Path) -> Any:
    """Return the state dict in a checkpoint, or `content` itself if it is no checkpoint."""
    while isinstance(content, dict):
        entries = [key for key in WRAPPERS if isinstance(content.get(key), dict)]
        if not entries:
            break
        unused = f"; not read: {', '.join(entries[1:])}" if entries[1:] else ""
        log.info("%s: read the entry %r of the checkpoint%s", path, entries[0], unused)
        content = content[entries[0]]
    return content


def _first(keys: Any) -> str:
    names = [str(key) for key in keys]
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") or "none"


def _read_zip(raw: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        _check_zip(archive, len(raw))
        names = [n for n in archive.namelist() if n.endswith("/data.pkl") or n == "data.pkl"]
        if len(names) != 1:
            raise UserError(
                f"not a PyTorch file: a zip with {len(names)} files named data.pkl; expected "
                "one data.pkl"
            )
        root = names[0].removesuffix("data.pkl")
        unpickler = _Unpickler(io.BytesIO(archive.read(names[0])))
        content = unpickler.load()
        arrays = {
            key: np.frombuffer(archive.read(f"{root}data/{key}"), storage.dtype)
            for key, storage in unpickler.storages.items()
        }
    return _to_arrays(content, arrays)


def _check_zip(archive: zipfile.ZipFile, num_bytes: int) -> None:
    """Raise UserError for a TorchScript archive and for files too large for the archive."""
    if any(name.endswith("/constants.pkl") for name in archive.namelist()):
        raise UserError(
            "it is a TorchScript archive, which holds a program; in PyTorch, save "
            "torch.jit.load(path).state_dict() instead"
        )
    total = sum(info.file_size for info in archive.infolist())
    if total > MAX_EXPANSION * num_bytes:
        raise UserError(
            f"its files are said to have {total} bytes, but the archive has {num_bytes}; expected "
            "the uncompressed archive that torch.save writes"
        )


def _read_legacy(raw: bytes) -> Any:
    stream = io.BytesIO(raw)
    if _Unpickler(stream).load() != LEGACY_MAGIC:
        raise UserError("not a PyTorch file: neither a zip nor the legacy magic number")
    _Unpickler(stream).load()  # protocol version
    _Unpickler(stream).load()  # sizes of C types on the machine that wrote the file
    unpickler = _Unpickler(stream)
    content = unpickler.load()
    arrays = {}
    for key in _Unpickler(stream).load():
        count = int(np.frombuffer(stream.read(8), "<i8")[0])
        dtype = unpickler.storages[str(key)].dtype
        arrays[str(key)] = np.frombuffer(stream.read(count * dtype.itemsize), dtype)
    return _to_arrays(content, arrays)


def _to_arrays(content: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(content, _LazyTensor):
        return _view(content, arrays[content.storage.key])
    if isinstance(content, dict):
        return {key: _to_arrays(value, arrays) for key, value in content.items()}
    return content


def _view(view: _LazyTensor, storage: np.ndarray) -> np.ndarray:
    """Return a view of a storage. Raises UserError if it has elements outside, or repeats many.

    Strides of zero would let a file of a few bytes ask for terabytes.
    """
    last_index = view.offset + sum((n - 1) * s for n, s in zip(view.size, view.stride, strict=True))
    if 0 in view.size:
        return np.zeros(view.size, storage.dtype)
    if view.offset < 0 or min(view.stride, default=0) < 0 or last_index >= len(storage):
        raise UserError(f"a tensor of shape {view.size} reaches beyond its storage")
    if math.prod(view.size) > len(storage):
        raise UserError(
            f"a tensor of shape {view.size} repeats the {len(storage)} elements of its storage; "
            "save a contiguous copy of it"
        )
    strides = [step * storage.itemsize for step in view.stride]
    return np.lib.stride_tricks.as_strided(
        storage[view.offset :], view.size, strides, writeable=False
    )
