"""Batches of a pipeline with feature stores."""

import numpy as np
import pytest

from imgtune_jax.data import FeatureStore
from tests.data.conftest import BATCH_SIZE, host_rows, take


def filled_store(folder, values, valid=None):
    """Return a float32 store that contains `values` [views n …]."""
    views, n = values.shape[:2]
    store = FeatureStore.open(
        folder, views=views, num_records=n, shape=values.shape[2:], dtype="float32", key={}
    )
    for view in range(views):
        rows_valid = np.ones(n, bool) if valid is None else valid
        store.write(np.full(n, view), np.arange(n), values[view], rows_valid)
    store.flush()
    return store


def test_view_v_has_the_inputs_of_epoch_v(make_pipeline, tmp_path):
    """Inputs are augmented images and captions. Epoch v is that of a run without a store."""
    store = FeatureStore.open(tmp_path, views=2, num_records=37, shape=(1,), dtype="int8", key={})
    uncached = make_pipeline(batch_size=37)
    filling = make_pipeline(batch_size=37, stores={"image": store})
    for t, batch in enumerate(take(filling, 0, 4)):
        (expected,) = take(uncached, t % 2, 1)
        assert batch["image_view"].tolist() == [t % 2] * 37 and batch["image_good"].all()
        order, expected_order = (np.argsort(x["index"]) for x in (batch, expected))
        np.testing.assert_array_equal(batch["image"][order], expected["image"][expected_order])


def test_stored_features_replace_decoding(make_pipeline, monkeypatch, tmp_path):
    uncached = take(make_pipeline(), 0, 15)
    features = np.random.default_rng(0).standard_normal((2, 37, 5)).astype(np.float32)

    def fail(*args, **kwargs):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr("imgtune_jax.data.image.open_image", fail)
    stores = {"image": filled_store(tmp_path, features)}
    batches = take(make_pipeline(stores=stores), 0, 15)
    for t, (batch, expected) in enumerate(zip(batches, uncached, strict=True)):
        assert "image" not in batch and batch["image_features"].dtype == np.float32
        for key in ("text", "text_mask", "index", "group", "example_mask"):
            np.testing.assert_array_equal(batch[key], expected[key])
        epochs = (t * BATCH_SIZE + np.arange(BATCH_SIZE)) // 37
        np.testing.assert_array_equal(batch["image_features"], features[epochs % 2, batch["index"]])
    per_host = [take(make_pipeline(stores=stores, rows=host_rows(h, 2)), 0, 15) for h in range(2)]
    for t in range(15):
        concatenated = np.concatenate([host[t]["image_features"] for host in per_host])
        np.testing.assert_array_equal(concatenated, batches[t]["image_features"])


def test_no_features_are_read_from_a_view_that_lacks_a_row(make_pipeline, tmp_path):
    """A batch has features for all rows or for none, so that all hosts run the same program."""
    store = FeatureStore.open(
        tmp_path, views=2, num_records=37, shape=(1,), dtype="float32", key={}
    )
    ids = np.arange(37)
    for view, rows in ((0, ids), (1, ids[1:])):
        ones = np.ones(len(rows))
        store.write(np.full(len(rows), view), rows, ones[:, None], ones > 0)
    store.flush()
    pipeline = make_pipeline(stores={"image": store})
    for t, batch in enumerate(take(pipeline, 0, 12)):
        ends = t * BATCH_SIZE, (t + 1) * BATCH_SIZE - 1
        views = {position // 37 % 2 for position in ends}
        assert ("image" in batch) == (1 in views) == ("image_features" not in batch)


def test_image_bytes_are_not_read_if_features_are_stored(make_pipeline, monkeypatch, tmp_path):
    source_class = type(make_pipeline().source)
    monkeypatch.setattr(source_class, "__getitem__", lambda self, i: pytest.fail("bytes were read"))
    stores = {"image": filled_store(tmp_path, np.ones((1, 37, 2), np.float32))}
    (batch, _) = take(make_pipeline(stores=stores), 0, 2)
    assert (batch["image_features"] == 1).all()


def test_records_that_were_bad_when_cached_are_masked_and_counted(make_pipeline, tmp_path):
    valid = np.ones(37, bool)
    valid[[3, 30]] = False
    features = np.ones((1, 37, 2), np.float32)
    features[:, ~valid] = np.nan
    pipeline = make_pipeline(
        stores={"image": filled_store(tmp_path, features, valid)}, batch_size=37
    )
    (batch,) = take(pipeline, 0, 1)
    np.testing.assert_array_equal(batch["example_mask"], valid[batch["index"]])
    assert not batch["image_features"][~batch["example_mask"]].any()
    assert pipeline.bad_records() == {"seen": 37, "invalid_features": 2}
