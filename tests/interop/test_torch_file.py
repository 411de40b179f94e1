"""PyTorch files are read correctly and run no code.

The tests write files in PyTorch's two formats, without PyTorch.
"""

import argparse
import collections
import io
import logging
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest

from imgtune_jax import interop
from imgtune_jax.errors import UserError
from imgtune_jax.interop.torch_file import WRAPPERS, load_state_dict

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


@pytest.mark.parametrize("entry", WRAPPERS)
def test_every_name_of_the_state_dict_in_a_checkpoint_is_known(entry, tmp_path):
    write_zip(tmp_path / "m.pt", {"epoch": 3, entry: {"w": as_tensor(np.ones(2, "<f4"))}})
    assert list(load_state_dict(tmp_path / "m.pt")) == ["w"]


def test_trained_parameters_are_preferred_to_their_average_and_the_choice_is_logged(
    tmp_path, caplog
):
    trained, average = ({"w": as_tensor(np.full(2, x, "<f4"))} for x in (1, 2))
    write_zip(tmp_path / "m.pt", {"ema": average, "model": trained})
    with caplog.at_level(logging.INFO, "imgtune_jax.interop"):
        np.testing.assert_array_equal(load_state_dict(tmp_path / "m.pt")["w"], [1, 1])
    assert "read the entry 'model' of the checkpoint; not read: ema" in caplog.text


def test_settings_and_counters_in_a_checkpoint_are_ignored(write, tmp_path):
    content = {
        "args": argparse.Namespace(lr=0.1, output=pathlib.PurePosixPath("runs")),
        "best": np.float64(0.5),
        "counts": collections.defaultdict(int, {"a": 1}),
        "model": {"w": as_tensor(np.ones(2, "<f4"))},
    }
    write(tmp_path / "m.pt", content)
    assert list(load_state_dict(tmp_path / "m.pt")) == ["w"]


def test_dict_without_a_state_dict_is_an_error_that_lists_its_keys(tmp_path):
    write_zip(tmp_path / "m.pt", {"optimizer": {}, "epoch": 3})
    with pytest.raises(UserError, match="with the keys optimizer, epoch; expected a state dict"):
        load_state_dict(tmp_path / "m.pt")


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
    with pytest.raises(UserError, match="refused") as error:
        interop.read_state_dict(tmp_path / "m.pth")
    assert "original has another size" not in str(error.value)
    assert not marker.exists()


def test_view_beyond_its_storage_is_refused(write, tmp_path):
    write(tmp_path / "m.pth", {"w": _Tensor(np.zeros(4, "<f4"), (1000,), (1,))})
    with pytest.raises(ValueError, match="beyond its storage"):
        load_state_dict(tmp_path / "m.pth")


@pytest.mark.parametrize("strides", [(0, 0), (0, 1)])
def test_view_with_more_elements_than_its_storage_is_refused(strides, write, tmp_path):
    """Copying these views would need terabytes."""
    write(tmp_path / "m.pth", {"w": _Tensor(np.zeros(4, "<f4"), (10**12, 4), strides)})
    with pytest.raises(UserError, match="repeats the 4 elements of its storage"):
        load_state_dict(tmp_path / "m.pth")


def test_zip_that_expands_to_many_times_its_size_is_refused(tmp_path):
    write_zip(tmp_path / "m.pth", {"w": as_tensor(np.zeros(1 << 20, "<f4"))})
    with zipfile.ZipFile(tmp_path / "m.pth") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "m.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match="its files are said to have 4194"):
        load_state_dict(tmp_path / "m.pth")


def test_torchscript_is_named(tmp_path):
    write_zip(tmp_path / "m.pt", {"w": as_tensor(np.ones(2, "<f4"))})
    with zipfile.ZipFile(tmp_path / "m.pt", "a") as archive:
        archive.writestr("archive/constants.pkl", b"")
        archive.writestr("archive/code/__torch__.py", "")
    with pytest.raises(UserError, match=r"m\.pt .*TorchScript archive.*state_dict") as error:
        interop.read_state_dict(tmp_path / "m.pt")
    assert "original has another size" not in str(error.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [("_rebuild_tensor_v3", "float8"), ("_rebuild_qtensor", "quantized")],
)
def test_tensors_of_unreadable_types_are_named(function, message, tmp_path):
    write_zip(tmp_path / "m.pt", {"w": _Global("torch._utils", function)})
    with pytest.raises(UserError, match=message):
        load_state_dict(tmp_path / "m.pt")


def test_file_that_is_not_a_pytorch_file_is_an_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme", "x")
    with pytest.raises(ValueError, match=r"one data\.pkl"):
        load_state_dict(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps([1, 2], protocol=2))
    with pytest.raises(ValueError, match="legacy magic"):
        load_state_dict(tmp_path / "b.pt")
