"""PyTorch files are read correctly and run no code.

The tests write files in PyTorch's two formats, without PyTorch.
"""

import collections
import io
import os
import pickle
import zipfile

import numpy as np
import pytest

from imgtune_jax.interop.torch_file import load_state_dict

TYPES = {"<f4": "FloatStorage", "<f8": "DoubleStorage", "<i8": "LongStorage", "<f2": "HalfStorage"}


class _Writer(pickle._Pickler):
    """A pickler that writes a `_Tensor` as PyTorch does: a call of _rebuild_tensor_v2."""

    def __init__(self, stream, storages):
        super().__init__(stream, protocol=2)
        self.storages = storages

    def persistent_id(self, obj):
        if isinstance(obj, _StorageOf):
            key = str(len(self.storages))
            self.storages[key] = obj.array
            storage_class = _Global("torch", TYPES[obj.array.dtype.newbyteorder("<").str])
            return ("storage", storage_class, key, "cpu", obj.array.size)
        return None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, _Global):
            self.write(b"c" + obj.module.encode() + b"\n" + obj.name.encode() + b"\n")
        elif isinstance(obj, _Tensor):
            arguments = (
                _StorageOf(obj.storage),
                obj.offset,
                obj.shape,
                obj.strides,
                False,
                collections.OrderedDict(),
            )
            self.save(_Global("torch._utils", "_rebuild_tensor_v2"))
            self.save(arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


class _Global:
    """A class or function that is pickled by name."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class _StorageOf:
    """The storage of a tensor, which PyTorch writes outside the pickle."""

    def __init__(self, array):
        self.array = array


class _Tensor:
    """A view of a flat storage. Offset and strides are in elements."""

    def __init__(self, storage, shape, strides, offset=0):
        self.storage, self.shape, self.strides, self.offset = storage, shape, strides, offset


def as_tensor(array):
    byte_strides = np.ascontiguousarray(array).strides if array.ndim else ()
    return _Tensor(np.ravel(array), array.shape, tuple(s // array.itemsize for s in byte_strides))


def write_zip(path, content):
    storages, stream = {}, io.BytesIO()
    _Writer(stream, storages).dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        archive.writestr("archive/version", "3\n")
        for key, array in storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())


def write_legacy(path, content):
    storages, stream = {}, io.BytesIO()
    for header in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(header, stream, protocol=2)
    _Writer(stream, storages).dump(content)
    pickle.dump(list(storages), stream, protocol=2)
    for array in storages.values():
        stream.write(np.int64(array.size).tobytes() + array.tobytes())
    path.write_bytes(stream.getvalue())


@pytest.fixture(params=[write_zip, write_legacy], ids=["zip", "legacy"])
def write(request):
    return request.param


def test_tensors_are_read_as_written(write, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "weight": rng.normal(size=(3, 4)).astype("<f4"),
        "double": rng.normal(size=(2, 3, 2)).astype("<f8"),
        "half": rng.normal(size=5).astype("<f2"),
        "count": np.array(7, "<i8"),
        "empty": np.zeros((0, 3), "<f4"),
    }
    write(tmp_path / "m.pth", {name: as_tensor(x) for name, x in arrays.items()})
    read = load_state_dict(tmp_path / "m.pth")
    assert read.keys() == arrays.keys()
    for name, x in arrays.items():
        assert read[name].dtype == x.dtype
        np.testing.assert_array_equal(read[name], x)


def test_views_have_their_strides_and_offset(write, tmp_path):
    storage = np.arange(12, dtype="<f4")
    tensors = {
        "transposed": _Tensor(storage, (4, 3), (1, 4)),
        "second_half": _Tensor(storage, (2, 3), (3, 1), offset=6),
    }
    write(tmp_path / "m.pt", tensors)
    read = load_state_dict(tmp_path / "m.pt")
    np.testing.assert_array_equal(read["transposed"], storage.reshape(3, 4).T)
    np.testing.assert_array_equal(read["second_half"], storage[6:].reshape(2, 3))


def test_state_dict_is_read_from_a_checkpoint(write, tmp_path):
    write(tmp_path / "m.pt", {"epoch": 3, "state_dict": {"w": as_tensor(np.ones(2, "<f4"))}})
    assert list(load_state_dict(tmp_path / "m.pt")) == ["w"]


class Attack:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [(os.system, "touch {}"), (eval, "open('{}', 'w')"), (getattr, "text", "join")],
    ids=["system", "eval", "getattr"],
)
def test_malicious_pickle_is_refused_and_runs_no_code(call, write, tmp_path):
    marker = tmp_path / "marker"
    write(tmp_path / "m.pth", {"w": Attack(call[0], *(x.format(marker) for x in call[1:]))})
    with pytest.raises(pickle.UnpicklingError, match="refused"):
        load_state_dict(tmp_path / "m.pth")
    assert not marker.exists()


def test_view_beyond_its_storage_is_refused(write, tmp_path):
    write(tmp_path / "m.pth", {"w": _Tensor(np.zeros(4, "<f4"), (1000,), (1,))})
    with pytest.raises(ValueError, match="beyond its storage"):
        load_state_dict(tmp_path / "m.pth")


def test_file_that_is_not_a_pytorch_file_is_an_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme", "x")
    with pytest.raises(ValueError, match=r"one data\.pkl"):
        load_state_dict(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps([1, 2], protocol=2))
    with pytest.raises(ValueError, match="legacy magic"):
        load_state_dict(tmp_path / "b.pt")
