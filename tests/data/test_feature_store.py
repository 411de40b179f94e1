"""Feature stores return the rows that were written, also by killed and other processes."""

import json
import pickle

import ml_dtypes
import numpy as np
import pytest

from imgtune_jax.data import FeatureStore
from imgtune_jax.data.feature_store import STORE_DTYPES, decode_rows, encode_rows

SHAPE = (3, 8)


def open_store(folder, dtype="float32", **changes):
    fields = dict(
        views=2, num_records=10, shape=SHAPE, dtype=dtype, key={"weights": "a", "seed": 0}
    )
    return FeatureStore.open(folder, **(fields | changes))


def random_rows(k, seed=0):
    values = np.random.default_rng(seed).normal(0, 10, (k, *SHAPE)).astype(np.float32)
    values[0, 0] = 0
    return values


@pytest.mark.parametrize("dtype", STORE_DTYPES)
def test_read_returns_the_rows_that_write_returned(tmp_path, dtype):
    store = open_store(tmp_path, dtype)
    views, ids, values = np.array([1, 0, 1]), np.array([4, 9, 0]), random_rows(3)
    written = store.write(views, ids, values, np.ones(3, bool))
    assert not store.contains(views, ids), "rows in memory are not on disk"
    store.flush()
    assert store.contains(views, ids) and not store.contains(np.array([0]), np.array([0]))
    for reader in (store, open_store(tmp_path, dtype), pickle.loads(pickle.dumps(store))):
        read, valid = reader.read(views[::-1], ids[::-1])
        np.testing.assert_array_equal(read, written[::-1])
        assert valid.all() and read.dtype == np.float32


def test_rounding_and_size_of_each_dtype():
    rows = random_rows(5)
    np.testing.assert_array_equal(decode_rows(encode_rows(rows, "float32"), SHAPE, "float32"), rows)
    rounded = rows.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(
        decode_rows(encode_rows(rows, "bfloat16"), SHAPE, "bfloat16"), rounded
    )
    decoded = decode_rows(encode_rows(rows, "int8"), SHAPE, "int8")
    step = np.abs(rows).max(-1, keepdims=True) / 127  # one scale per vector
    assert (np.abs(decoded - rows) <= step / 2 * (1 + 1e-5)).all()
    sizes = {dtype: len(encode_rows(rows, dtype)[0]) for dtype in STORE_DTYPES}
    assert sizes == {"float32": 96, "bfloat16": 48, "int8": 24 + 3 * 4}  # bytes of a row


def test_bad_records_are_stored_as_invalid(tmp_path):
    store = open_store(tmp_path)
    valid = np.array([True, False])
    values = random_rows(2)
    values[1] = np.nan
    written = store.write(np.zeros(2, int), np.array([3, 5]), values, valid)
    assert np.isfinite(written).all()
    store.flush()
    read, read_valid = store.read(np.zeros(2, int), np.array([3, 5]))
    np.testing.assert_array_equal(read_valid, valid)
    np.testing.assert_array_equal(read, written)


def test_a_view_is_complete_when_all_its_rows_are_on_disk(tmp_path):
    store = open_store(tmp_path)
    all_ids = np.arange(10)
    assert store.first_missing == 0
    for ids in (all_ids[:7], all_ids[5:]):  # rows 5 and 6 twice
        store.write(np.zeros(len(ids), int), ids, random_rows(len(ids)), np.ones(len(ids), bool))
        store.flush()
    assert store.complete_views().tolist() == [True, False]
    assert store.first_missing == 10 and store.num_rows == 10, "no row is written twice"
    with pytest.raises(KeyError, match="2 rows are not in"):
        store.read(np.array([0, 1, 1]), np.array([0, 0, 1]))


def test_a_killed_process_loses_only_the_rows_after_its_last_flush(tmp_path):
    store = open_store(tmp_path)
    store.write(np.zeros(4, int), np.arange(4), random_rows(4), np.ones(4, bool))
    store.flush()
    store.write(np.zeros(2, int), np.array([4, 5]), random_rows(2), np.ones(2, bool))
    # The process is killed here, before it flushes.
    (tmp_path / "half.tmp").write_bytes(b"an incomplete segment")
    (tmp_path / "half.array_record").write_bytes(b"a segment whose ids were not written")
    reopened = open_store(tmp_path)
    assert reopened.first_missing == 4
    reopened.write(np.zeros(6, int), np.arange(4, 10), random_rows(6), np.ones(6, bool))
    reopened.flush()
    assert reopened.complete_views().tolist() == [True, False]


def test_two_processes_can_fill_one_folder(tmp_path):
    first, second = open_store(tmp_path), open_store(tmp_path)
    for store, ids in ((first, np.arange(6)), (second, np.arange(4, 10))):
        store.write(np.zeros(6, int), ids, random_rows(6), np.ones(6, bool))
        store.flush()
    first.refresh()
    assert first.complete_views()[0] and second.complete_views()[0]


@pytest.mark.parametrize(
    ("change", "name"),
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
def test_error_names_the_entries_that_differ_from_an_existing_store(tmp_path, change, name):
    open_store(tmp_path)
    with pytest.raises(ValueError, match=f"another key; these entries differ: {name}\\."):
        open_store(tmp_path, **change)
    assert json.loads((tmp_path / "manifest.json").read_text())["weights"] == "a"


def test_an_unknown_dtype_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="'float8'; expected one of float32, bfloat16, int8"):
        open_store(tmp_path, "float8")
