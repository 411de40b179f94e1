"""Feature stores: what is written is what is read, whatever happens between."""

import json
import pickle

import ml_dtypes
import numpy as np
import pytest

from imgtune_jax.data import FeatureStore
from imgtune_jax.data.feature_store import STORE_DTYPES, decode_rows, encode_rows

SHAPE = (3, 8)


def opened(folder, dtype="float32", **changes):
    fields = dict(
        views=2, num_records=10, shape=SHAPE, dtype=dtype, key={"weights": "a", "seed": 0}
    )
    return FeatureStore.open(folder, **(fields | changes))


def rows(k, seed=0):
    values = np.random.default_rng(seed).normal(0, 10, (k, *SHAPE)).astype(np.float32)
    values[0, 0] = 0
    return values


@pytest.mark.parametrize("dtype", STORE_DTYPES)
def test_a_row_is_read_as_it_was_promised(tmp_path, dtype):
    store = opened(tmp_path, dtype)
    views, ids, values = np.array([1, 0, 1]), np.array([4, 9, 0]), rows(3)
    promised = store.write(views, ids, values, np.ones(3, bool))
    assert not store.contains(views, ids), "rows in memory are on no disk"
    store.flush()
    assert store.contains(views, ids) and not store.contains(np.array([0]), np.array([0]))
    for reader in (store, opened(tmp_path, dtype), pickle.loads(pickle.dumps(store))):
        found, good = reader.read(views[::-1], ids[::-1])
        np.testing.assert_array_equal(found, promised[::-1])
        assert good.all() and found.dtype == np.float32


def test_the_rounding_of_each_type_is_the_stated_one():
    x = rows(5)
    np.testing.assert_array_equal(decode_rows(encode_rows(x, "float32"), SHAPE, "float32"), x)
    half = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(decode_rows(encode_rows(x, "bfloat16"), SHAPE, "bfloat16"), half)
    found = decode_rows(encode_rows(x, "int8"), SHAPE, "int8")
    step = np.abs(x).max(-1, keepdims=True) / 127  # one scale a vector
    assert (np.abs(found - x) <= step / 2 * (1 + 1e-5)).all()
    sizes = {d: len(encode_rows(x, d)[0]) for d in STORE_DTYPES}
    assert sizes == {"float32": 96, "bfloat16": 48, "int8": 24 + 3 * 4}


def test_broken_records_are_remembered(tmp_path):
    store = opened(tmp_path)
    good = np.array([True, False])
    values = rows(2)
    values[1] = np.nan
    promised = store.write(np.zeros(2, int), np.array([3, 5]), values, good)
    assert np.isfinite(promised).all()
    store.flush()
    found, usable = store.read(np.zeros(2, int), np.array([3, 5]))
    np.testing.assert_array_equal(usable, good)
    np.testing.assert_array_equal(found, promised)


def test_a_view_is_complete_when_all_its_rows_are_there(tmp_path):
    store = opened(tmp_path)
    everything = np.arange(10)
    assert store.first_missing == 0
    for part in (everything[:7], everything[5:]):  # rows 5 and 6 twice
        store.write(np.zeros(len(part), int), part, rows(len(part)), np.ones(len(part), bool))
        store.flush()
    assert store.complete_views().tolist() == [True, False]
    assert store.first_missing == 10 and store.num_rows == 10, "no row is written twice"
    with pytest.raises(KeyError, match="2 rows are not in"):
        store.read(np.array([0, 1, 1]), np.array([0, 0, 1]))


def test_what_was_flushed_survives_a_kill_and_nothing_else_appears(tmp_path):
    store = opened(tmp_path)
    store.write(np.zeros(4, int), np.arange(4), rows(4), np.ones(4, bool))
    store.flush()
    store.write(np.zeros(2, int), np.array([4, 5]), rows(2), np.ones(2, bool))  # killed here
    (tmp_path / "half.tmp").write_bytes(b"half a segment")
    (tmp_path / "half.array_record").write_bytes(b"a segment whose ids were not written")
    again = opened(tmp_path)
    assert again.first_missing == 4
    again.write(np.zeros(6, int), np.arange(4, 10), rows(6), np.ones(6, bool))
    again.flush()
    assert again.complete_views().tolist() == [True, False]


def test_two_processes_may_fill_one_folder(tmp_path):
    one, other = opened(tmp_path), opened(tmp_path)
    for store, ids in ((one, np.arange(6)), (other, np.arange(4, 10))):
        store.write(np.zeros(6, int), ids, rows(6), np.ones(6, bool))
        store.flush()
    one.refresh()
    assert one.complete_views()[0] and other.complete_views()[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(key={"weights": "b", "seed": 0}), "weights"),
        (dict(key={"weights": "a", "seed": 1}), "seed"),
        (dict(key={"weights": "a", "seed": 0, "more": 1}), "more"),
        (dict(views=3), "views"),
        (dict(num_records=11), "n"),
        (dict(shape=(8,)), "shape"),
        (dict(dtype="int8"), "dtype"),
    ],
)
def test_a_foreign_folder_is_refused_by_name(tmp_path, change, named):
    opened(tmp_path)
    with pytest.raises(ValueError, match=f"of another origin; they differ in {named}\\."):
        opened(tmp_path, **change)
    assert json.loads((tmp_path / "manifest.json").read_text())["weights"] == "a"


def test_an_unknown_type_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'float8'; expected one of float32, bfloat16, int8"):
        opened(tmp_path, "float8")
