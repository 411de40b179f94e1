import itertools
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from imgtune_jax.data import FeatureStore, Pipeline, Record, build_transform, decode_image

B = 8


@pytest.fixture
def make(source, tokenizer, augment):
    def build(**changes):
        fields = dict(
            source=source, transform=augment, tokenizer=tokenizer, batch_size=B, seed=3,
            caption_weights={"name": 0.6, "keywords": 0.4}, shuffle=True, num_threads=2, prefetch=2,
        )  # fmt: skip
        return Pipeline(**(fields | changes))

    return build


def take(pipeline, start, count):
    batches = pipeline.batches(start)
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def assert_equal(some, others):
    assert len(some) == len(others)
    for a, b in zip(some, others, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype, key
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_fields_of_a_batch(make):
    (batch,) = take(make(), 0, 1)
    kinds = {k: (v.dtype, v.shape) for k, v in batch.items()}
    assert kinds == {
        "image": (np.uint8, (B, 12, 12, 3)),
        "text": (np.int32, (B, 12)),
        "text_mask": (np.bool_, (B, 12)),
        "target_mask": (np.bool_, (B, 12)),
        "example_mask": (np.bool_, (B,)),
        "index": (np.int64, (B,)),
        "group": (np.int32, (B,)),
    }
    assert batch["example_mask"].all()
    assert all(isinstance(v, np.ndarray) for v in batch.values())


@pytest.mark.parametrize("threads, workers", [(0, 0), (1, 0), (7, 0), (1, 1), (2, 2)])
def test_batches_do_not_depend_on_threads_or_workers(make, threads, workers):
    want = take(make(num_threads=2), 3, 9)
    assert_equal(take(make(num_threads=threads, num_workers=workers), 3, 9), want)


def test_resumed_equals_uninterrupted(make):
    whole = take(make(), 0, 15)
    for start in (1, 4, 5, 11):
        assert_equal(take(make(), start, 15 - start), whole[start:])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_slices_joined_are_one_hosts_batch(make, hosts):
    whole = take(make(), 0, 7)
    parts = [take(make(host_index=h, host_count=hosts), 0, 7) for h in range(hosts)]
    joined = [
        {key: np.concatenate([part[t][key] for part in parts]) for key in whole[t]}
        for t in range(7)
    ]
    assert_equal(joined, whole)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_shows_every_record_once(make, shuffle):
    stream = np.concatenate([b["index"] for b in take(make(shuffle=shuffle), 0, 37)])
    for epoch in range(8):  # 37 batches of 8 are 8 epochs of 37
        part = stream[epoch * 37 : (epoch + 1) * 37]
        assert sorted(part) == list(range(37))


def test_orders_differ_by_epoch_and_seed(make):
    def orders(seed):
        stream = np.concatenate([b["index"] for b in take(make(seed=seed), 0, 15)])
        return [tuple(stream[e * 37 : (e + 1) * 37]) for e in range(3)]

    # Also not those of the next seed, shifted by an epoch.
    assert len(set(orders(3) + orders(4) + orders(5))) == 9


def test_where_the_epoch_of_a_step_ends(make):
    pipeline = make()
    assert [pipeline.epoch_end(t) for t in (0, 4, 5, 9, 10)] == [5, 5, 10, 10, 14]


def test_augmentation_and_caption_differ_by_epoch_and_not_by_position(make, source, augment):
    pipeline = make(batch_size=37, shuffle=False)
    first, second = take(pipeline, 0, 2)
    assert (first["image"] != second["image"]).any(axis=(1, 2, 3)).mean() > 0.9
    assert (first["text"] != second["text"]).any(axis=1).mean() > 0.2
    shuffled = take(make(batch_size=37), 0, 1)[0]
    back = np.argsort(shuffled["index"])  # drawn for (seed, epoch, index): wherever it comes
    np.testing.assert_array_equal(shuffled["image"][back], first["image"])
    np.testing.assert_array_equal(shuffled["text"][back], first["text"])
    other = take(make(batch_size=37, shuffle=False, seed=4), 0, 1)[0]
    assert (first["image"] != other["image"]).any()


def test_captions_are_drawn_by_weight(make, tokenizer):
    names, _ = tokenizer([f"thing number {i}" for i in range(37)])
    batches = take(make(batch_size=37, shuffle=False, transform=None), 0, 40)
    share = np.mean([(b["text"] == names).all(1) for b in batches])
    assert abs(share - 0.6) < 4 * (0.24 / 1480) ** 0.5  # four standard deviations


def test_one_pass_is_ordered_exact_and_padded(make):
    resize = build_transform([{"name": "resize", "size": 12}])
    pipeline = make(transform=resize)
    batches = list(pipeline.one_pass())
    assert len(batches) == 5
    index = np.concatenate([b["index"] for b in batches])
    mask = np.concatenate([b["example_mask"] for b in batches])
    assert index.tolist() == [*range(37), -1, -1, -1]
    assert mask.tolist() == [True] * 37 + [False] * 3
    source = pipeline.source
    for batch in batches:
        for row in np.flatnonzero(batch["example_mask"]):
            want = resize(decode_image(source[int(batch["index"][row])].image))
            np.testing.assert_array_equal(batch["image"][row], want)
    last = batches[-1]
    assert not last["image"][5:].any() and not last["text"][5:].any()
    assert not last["text_mask"][5:].any() and (last["group"][5:] == -1).all()
    assert pipeline.bad_records() == {"seen": 37}


def test_one_pass_over_hosts_is_one_pass(make):
    whole = list(make().one_pass())
    parts = [list(make(host_index=h, host_count=2).one_pass()) for h in range(2)]
    joined = [
        {k: np.concatenate([part[t][k] for part in parts]) for k in whole[t]}
        for t in range(len(whole))
    ]
    assert_equal(joined, whole)


def test_one_pass_reads_the_first_caption_of_the_heaviest_set(make, tokenizer):
    batch = next(iter(make(caption_weights={"name": 0.2, "keywords": 0.8}).one_pass()))
    np.testing.assert_array_equal(batch["text"], tokenizer([f"key {i}" for i in range(B)])[0])


def test_images_alone_need_no_tokenizer(make):
    (batch,) = take(make(tokenizer=None, caption_weights={}), 0, 1)
    assert set(batch) == {"image", "example_mask", "index"}


def filled(folder, values, good=None):
    """A store of values [views n …] in float32."""
    views, n = values.shape[:2]
    store = FeatureStore.open(
        folder, views=views, num_records=n, shape=values.shape[2:], dtype="float32", key={}
    )
    for view in range(views):
        ids = np.arange(n)
        store.write(np.full(n, view), ids, values[view], np.ones(n, bool) if good is None else good)
    store.flush()
    return store


def test_a_view_is_the_epoch_of_a_run(make, tmp_path):
    """What fills a store is what the same epoch of a run without one sees, view after view."""
    store = FeatureStore.open(tmp_path, views=2, num_records=37, shape=(1,), dtype="int8", key={})
    plain, filling = make(batch_size=37), make(batch_size=37, stores={"image": store})
    for t, batch in enumerate(take(filling, 0, 4)):
        (other,) = take(plain, t % 2, 1)
        assert batch["image_view"].tolist() == [t % 2] * 37 and batch["image_good"].all()
        order = [np.argsort(x["index"]) for x in (batch, other)]
        np.testing.assert_array_equal(batch["image"][order[0]], other["image"][order[1]])


def test_stored_features_replace_decoding(make, monkeypatch, tmp_path):
    plain = take(make(), 0, 15)
    features = np.random.default_rng(0).standard_normal((2, 37, 5)).astype(np.float32)

    def fail(*args, **kwargs):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr("imgtune_jax.data.image.open_image", fail)
    stores = {"image": filled(tmp_path, features)}
    batches = take(make(stores=stores), 0, 15)
    for t, (batch, other) in enumerate(zip(batches, plain, strict=True)):
        assert "image" not in batch and batch["image_features"].dtype == np.float32
        for key in ("text", "text_mask", "index", "group", "example_mask"):
            np.testing.assert_array_equal(batch[key], other[key])
        epochs = (t * B + np.arange(B)) // 37
        np.testing.assert_array_equal(batch["image_features"], features[epochs % 2, batch["index"]])
    parts = [take(make(stores=stores, host_index=h, host_count=2), 0, 15) for h in range(2)]
    for t in range(15):
        joined = np.concatenate([part[t]["image_features"] for part in parts])
        np.testing.assert_array_equal(joined, batches[t]["image_features"])


def test_a_view_that_lacks_a_row_is_decoded_whole(make, tmp_path):
    """All rows of a batch are read, or none: all hosts must run the same program."""
    store = FeatureStore.open(
        tmp_path, views=2, num_records=37, shape=(1,), dtype="float32", key={}
    )
    ids = np.arange(37)
    for view, rows in ((0, ids), (1, ids[1:])):
        ones = np.ones(len(rows))
        store.write(np.full(len(rows), view), rows, ones[:, None], ones > 0)
    store.flush()
    pipeline = make(stores={"image": store})
    for t, batch in enumerate(take(pipeline, 0, 12)):
        epochs = {p // 37 % 2 for p in (t * B, t * B + B - 1)}
        assert ("image" in batch) == (1 in epochs) == ("image_features" not in batch)


def test_stored_features_leave_image_bytes_unread(make, monkeypatch, tmp_path):
    kind = type(make().source)
    monkeypatch.setattr(kind, "__getitem__", lambda self, i: pytest.fail("bytes were read"))
    stores = {"image": filled(tmp_path, np.ones((1, 37, 2), np.float32))}
    (batch, _) = take(make(stores=stores), 0, 2)
    assert (batch["image_features"] == 1).all()


def test_a_record_that_was_broken_when_stored_is_masked_and_counted(make, tmp_path):
    good = np.ones(37, bool)
    good[[3, 30]] = False
    features = np.ones((1, 37, 2), np.float32)
    features[:, ~good] = np.nan
    pipeline = make(stores={"image": filled(tmp_path, features, good)}, batch_size=37)
    (batch,) = take(pipeline, 0, 1)
    np.testing.assert_array_equal(batch["example_mask"], good[batch["index"]])
    assert not batch["image_features"][~batch["example_mask"]].any()
    assert pipeline.bad_records() == {"seen": 37, "invalid_features": 2}


def test_a_mixture_is_seen_in_its_proportions(make, source):
    from imgtune_jax.data import Mixture

    mixture = Mixture((source, source), (3, 1))
    pipeline = make(source=mixture, transform=None, batch_size=74)
    stream = np.concatenate([b["index"] for b in take(pipeline, 0, 4)])
    assert len(mixture) == 148
    counts = Counter(mixture.locate(int(i))[0] for i in stream)
    assert counts == {0: 222, 1: 74}


def test_texts_are_padded_to_the_least_bucket_that_holds_them(make):
    whole, cut = (
        take(make(batch_size=1), 0, 30),
        take(make(batch_size=1, length_buckets=(4, 5)), 0, 30),
    )
    lengths = Counter()
    for a, b in zip(whole, cut, strict=True):
        length, longest = b["text"].shape[1], a["text_mask"].sum(1).max()
        lengths[length] += 1
        assert length == min(n for n in (4, 5, 12) if n >= longest)
        for key in ("text", "text_mask", "target_mask"):
            np.testing.assert_array_equal(a[key][:, :length], b[key])
        assert not a["text_mask"][:, length:].any()
    assert set(lengths) == {4, 5, 12}
    (padded,) = itertools.islice(make(length_buckets=(7,)).one_pass(), 1)
    assert padded["text"].shape[1] == 12, "an evaluator sees one length"


@pytest.mark.parametrize("buckets", [(9, 7), (7, 7), (0, 7), (7, 12)])
def test_buckets_that_are_no_rising_lengths_are_refused(make, buckets):
    with pytest.raises(ValueError, match=r"length_buckets = .* below the tokenizer's length, 12"):
        make(length_buckets=buckets)


def test_buckets_are_refused_where_lengths_must_agree(make, tmp_path):
    with pytest.raises(ValueError, match="would not agree on a length"):
        make(length_buckets=(7,), host_count=2)
    store = FeatureStore.open(
        tmp_path, views=1, num_records=37, shape=(12, 4), dtype="float32", key={}
    )
    with pytest.raises(ValueError, match=r"cache\.text_views=0"):
        make(length_buckets=(7,), stores={"text": store})


def test_fields_that_do_not_fit_are_refused(make, source):
    with pytest.raises(ValueError, match="batch_size = 9 is not divisible by 2 hosts; 8 would be"):
        make(batch_size=9, host_count=2)
    with pytest.raises(ValueError, match="host_index = 2 with host_count = 2"):
        make(host_index=2, host_count=2)
    other = FeatureStore(Path("x"), views=1, num_records=36, shape=(2,), dtype="float32")
    with pytest.raises(ValueError, match=r"image features of 36 records, but the source has 37"):
        make(stores={"image": other})
    with pytest.raises(ValueError, match=r"no caption sets \['nmae'\]; it has"):
        make(caption_weights={"nmae": 1.0})
    with pytest.raises(ValueError, match="expected a weight above 0"):
        make(caption_weights={})
    shortest = build_transform([{"name": "resize", "size": 8, "mode": "shortest"}])
    with pytest.raises(ValueError, match="images of different sizes"):
        take(make(transform=shortest), 0, 1)


@dataclass(frozen=True)
class Counting:
    """Black pictures, in any process; a byte goes to the file at `path` whenever one is read."""

    path: str
    fingerprint: str = "black"

    def __len__(self):
        return 10_000

    def __getitem__(self, index):
        with open(self.path, "ab") as file:
            file.write(b"x")
        return Record(str(index), image=np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize("threads, workers, most", [(1, 0, 4), (3, 0, 4), (1, 1, 1 + 2 * 3 + 2)])
def test_no_more_is_read_ahead_than_promised(tmp_path, threads, workers, most):
    counts = tmp_path / "counts"
    counts.touch()
    pipeline = Pipeline(
        source=Counting(str(counts)), transform=build_transform([{"name": "resize", "size": 4}]),
        batch_size=B, prefetch=3,
        num_threads=threads, num_workers=workers,
    )  # fmt: skip
    batches, seen = pipeline.batches(), -1
    next(batches)
    while seen < counts.stat().st_size:  # until nothing more is read
        seen = counts.stat().st_size
        time.sleep(0.7)
    assert 2 <= seen / B <= 1 + most
    batches.close()


def test_order_is_pinned(make):
    """A checkpoint's step must mean the same batch in the next release, and after an update."""
    stream = np.concatenate([b["index"] for b in take(make(transform=None), 0, 6)])
    assert stream[:16].tolist() == [18, 33, 12, 36, 34, 16, 22, 21, 31, 1, 3, 8, 24, 0, 28, 10]
    assert stream[37:41].tolist() == [19, 34, 8, 2]  # the second epoch


def test_a_caption_set_has_its_prefix_which_carries_no_loss(make, tokenizer):
    prefix = "key"
    (batch,) = take(make(caption_weights={"name": 1.0}, prefixes={"name": prefix}), 0, 1)
    prompt = tokenizer.prompt_ids(prefix)
    assert (batch["text"][:, : len(prompt)] == prompt).all()
    assert not batch["target_mask"][:, : len(prompt)].any()
    rest = batch["text_mask"][:, len(prompt) :]
    np.testing.assert_array_equal(batch["target_mask"][:, len(prompt) :], rest)
    with pytest.raises(ValueError, match="prefixes for \\['nmae'\\]"):
        make(prefixes={"nmae": "key"})
