"""Batches of a pipeline without feature stores."""

import itertools
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from imgtune_jax.data import (
    FeatureStore,
    Mixture,
    Pipeline,
    Record,
    build_transform,
    decode_image,
)
from tests.data.conftest import BATCH_SIZE, assert_batches_equal, host_rows, take


def test_keys_dtypes_and_shapes_of_a_batch(make_pipeline):
    (batch,) = take(make_pipeline(), 0, 1)
    specs = {k: (v.dtype, v.shape) for k, v in batch.items()}
    assert specs == {
        "image": (np.uint8, (BATCH_SIZE, 12, 12, 3)),
        "text": (np.int32, (BATCH_SIZE, 12)),
        "text_mask": (np.bool_, (BATCH_SIZE, 12)),
        "target_mask": (np.bool_, (BATCH_SIZE, 12)),
        "example_mask": (np.bool_, (BATCH_SIZE,)),
        "index": (np.int64, (BATCH_SIZE,)),
        "group": (np.int32, (BATCH_SIZE,)),
    }
    assert batch["example_mask"].all()
    assert all(isinstance(v, np.ndarray) for v in batch.values())


@pytest.mark.parametrize("threads, workers", [(0, 0), (1, 0), (7, 0), (1, 1), (2, 2)])
def test_batches_do_not_depend_on_threads_or_workers(make_pipeline, threads, workers):
    expected = take(make_pipeline(num_threads=2), 3, 9)
    batches = take(make_pipeline(num_threads=threads, num_workers=workers), 3, 9)
    assert_batches_equal(batches, expected)


def test_resumed_batches_equal_uninterrupted_ones(make_pipeline):
    uninterrupted = take(make_pipeline(), 0, 15)
    for start in (1, 4, 5, 11):
        assert_batches_equal(take(make_pipeline(), start, 15 - start), uninterrupted[start:])


@pytest.mark.parametrize("hosts", [2, 4])
def test_concatenated_slices_of_all_hosts_equal_the_batch_of_a_single_host(make_pipeline, hosts):
    expected = take(make_pipeline(), 0, 7)
    per_host = [take(make_pipeline(rows=host_rows(h, hosts)), 0, 7) for h in range(hosts)]
    concatenated = [
        {key: np.concatenate([batches[t][key] for batches in per_host]) for key in expected[t]}
        for t in range(7)
    ]
    assert_batches_equal(concatenated, expected)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_contains_every_record_once(make_pipeline, shuffle):
    stream = np.concatenate([b["index"] for b in take(make_pipeline(shuffle=shuffle), 0, 37)])
    for epoch in range(8):  # 37 batches of 8 are 8 epochs of 37
        indices = stream[epoch * 37 : (epoch + 1) * 37]
        assert sorted(indices) == list(range(37))


def test_orders_differ_by_epoch_and_seed(make_pipeline):
    def orders(seed):
        stream = np.concatenate([b["index"] for b in take(make_pipeline(seed=seed), 0, 15)])
        return [tuple(stream[e * 37 : (e + 1) * 37]) for e in range(3)]

    # Three epochs of three seeds: in particular, seed 4 does not start with epoch 1 of seed 3.
    assert len(set(orders(3) + orders(4) + orders(5))) == 9


def test_epoch_end_is_the_first_batch_that_begins_in_a_later_epoch(make_pipeline):
    pipeline = make_pipeline()
    assert [pipeline.epoch_end(t) for t in (0, 4, 5, 9, 10)] == [5, 5, 10, 10, 14]


def test_augmentation_and_caption_depend_on_epoch_and_not_on_position(
    make_pipeline, source, augment
):
    pipeline = make_pipeline(batch_size=37, shuffle=False)
    first, second = take(pipeline, 0, 2)
    assert (first["image"] != second["image"]).any(axis=(1, 2, 3)).mean() > 0.9
    assert (first["text"] != second["text"]).any(axis=1).mean() > 0.2
    shuffled = take(make_pipeline(batch_size=37), 0, 1)[0]
    order = np.argsort(shuffled["index"])  # samples depend on (seed, epoch, index) only
    np.testing.assert_array_equal(shuffled["image"][order], first["image"])
    np.testing.assert_array_equal(shuffled["text"][order], first["text"])
    other = take(make_pipeline(batch_size=37, shuffle=False, seed=4), 0, 1)[0]
    assert (first["image"] != other["image"]).any()


def test_captions_are_sampled_by_weight(make_pipeline, tokenizer):
    names, _ = tokenizer([f"thing number {i}" for i in range(37)])
    batches = take(make_pipeline(batch_size=37, shuffle=False, transform=None), 0, 40)
    fraction = np.mean([(b["text"] == names).all(1) for b in batches])
    assert abs(fraction - 0.6) < 4 * (0.24 / 1480) ** 0.5  # four standard deviations


def test_one_pass_yields_every_record_in_order_and_pads_the_last_batch(make_pipeline):
    resize = build_transform([{"name": "resize", "size": 12}])
    pipeline = make_pipeline(transform=resize)
    batches = list(pipeline.one_pass())
    assert len(batches) == 5
    index = np.concatenate([b["index"] for b in batches])
    mask = np.concatenate([b["example_mask"] for b in batches])
    assert index.tolist() == [*range(37), -1, -1, -1]
    assert mask.tolist() == [True] * 37 + [False] * 3
    source = pipeline.source
    for batch in batches:
        for row in np.flatnonzero(batch["example_mask"]):
            expected = resize(decode_image(source[int(batch["index"][row])].image))
            np.testing.assert_array_equal(batch["image"][row], expected)
    last = batches[-1]
    assert not last["image"][5:].any() and not last["text"][5:].any()
    assert not last["text_mask"][5:].any() and (last["group"][5:] == -1).all()
    assert pipeline.bad_records() == {"seen": 37}


def test_concatenated_one_pass_batches_of_all_hosts_equal_those_of_a_single_host(make_pipeline):
    expected = list(make_pipeline().one_pass())
    per_host = [list(make_pipeline(rows=host_rows(h, 2)).one_pass()) for h in range(2)]
    concatenated = [
        {k: np.concatenate([batches[t][k] for batches in per_host]) for k in expected[t]}
        for t in range(len(expected))
    ]
    assert_batches_equal(concatenated, expected)


def test_one_pass_uses_the_first_caption_of_the_set_with_the_largest_weight(
    make_pipeline, tokenizer
):
    batch = next(iter(make_pipeline(caption_weights={"name": 0.2, "keywords": 0.8}).one_pass()))
    np.testing.assert_array_equal(
        batch["text"], tokenizer([f"key {i}" for i in range(BATCH_SIZE)])[0]
    )


def test_batches_without_a_tokenizer_have_no_text(make_pipeline):
    (batch,) = take(make_pipeline(tokenizer=None, caption_weights={}), 0, 1)
    assert set(batch) == {"image", "example_mask", "index"}


def test_records_of_a_mixture_are_read_in_its_proportions(make_pipeline, source):
    mixture = Mixture((source, source), (3, 1))
    pipeline = make_pipeline(source=mixture, transform=None, batch_size=74)
    stream = np.concatenate([b["index"] for b in take(pipeline, 0, 4)])
    assert len(mixture) == 148
    counts = Counter(mixture.locate(int(i))[0] for i in stream)
    assert counts == {0: 222, 1: 74}


def test_texts_are_padded_to_the_smallest_sufficient_bucket(make_pipeline):
    full = take(make_pipeline(batch_size=1), 0, 30)
    bucketed = take(make_pipeline(batch_size=1, length_buckets=(4, 5)), 0, 30)
    lengths = Counter()
    for a, b in zip(full, bucketed, strict=True):
        length, longest = b["text"].shape[1], a["text_mask"].sum(1).max()
        lengths[length] += 1
        assert length == min(n for n in (4, 5, 12) if n >= longest)
        for key in ("text", "text_mask", "target_mask"):
            np.testing.assert_array_equal(a[key][:, :length], b[key])
        assert not a["text_mask"][:, length:].any()
    assert set(lengths) == {4, 5, 12}
    (padded,) = itertools.islice(make_pipeline(length_buckets=(7,)).one_pass(), 1)
    assert padded["text"].shape[1] == 12, "evaluation uses one length"


@pytest.mark.parametrize("buckets", [(9, 7), (7, 7), (0, 7), (7, 12)])
def test_buckets_that_are_not_increasing_lengths_are_rejected(make_pipeline, buckets):
    with pytest.raises(ValueError, match=r"length_buckets = .* below the tokenizer's length, 12"):
        make_pipeline(length_buckets=buckets)


def test_buckets_are_rejected_if_all_batches_must_have_one_length(make_pipeline, tmp_path):
    with pytest.raises(ValueError, match="would not agree on a length"):
        make_pipeline(length_buckets=(7,), rows=host_rows(0, 2))
    store = FeatureStore.open(
        tmp_path, views=1, num_records=37, shape=(12, 4), dtype="float32", key={}
    )
    with pytest.raises(ValueError, match=r"cache\.text_views=0"):
        make_pipeline(length_buckets=(7,), stores={"text": store})


def test_a_host_may_have_rows_that_are_not_adjacent(make_pipeline):
    rows = (0, 1, BATCH_SIZE - 1)
    expected = [
        {k: v[list(rows)] for k, v in batch.items()} for batch in take(make_pipeline(), 3, 9)
    ]
    assert_batches_equal(take(make_pipeline(rows=rows), 3, 9), expected)


def test_contradictory_fields_are_rejected(make_pipeline, source):
    for rows in ((), (0, 0), (1, 0), (-1, 0), (0, BATCH_SIZE)):
        with pytest.raises(ValueError, match=rf"increasing numbers from 0 to {BATCH_SIZE - 1}"):
            make_pipeline(rows=rows)
    smaller_store = FeatureStore(Path("x"), views=1, num_records=36, shape=(2,), dtype="float32")
    with pytest.raises(ValueError, match="image features of 36 records, but the source has 37"):
        make_pipeline(stores={"image": smaller_store})
    with pytest.raises(ValueError, match=r"no caption sets \['nmae'\]; it has"):
        make_pipeline(caption_weights={"nmae": 1.0})
    with pytest.raises(ValueError, match="at least one above 0"):
        make_pipeline(caption_weights={})
    shortest = build_transform([{"name": "resize", "size": 8, "mode": "shortest"}])
    with pytest.raises(ValueError, match="images of different sizes"):
        take(make_pipeline(transform=shortest), 0, 1)


@dataclass(frozen=True)
class CountingSource:
    """A source of black images. Each read, in any process, appends a byte to the file at `path`."""

    path: str
    fingerprint: str = "black"

    def __len__(self):
        return 10_000

    def __getitem__(self, index):
        with open(self.path, "ab") as file:
            file.write(b"x")
        return Record(str(index), image=np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize(
    "threads, workers, max_ahead", [(1, 0, 4), (3, 0, 4), (1, 1, 1 + 2 * 3 + 2)]
)
def test_number_of_batches_read_ahead_is_limited(tmp_path, threads, workers, max_ahead):
    counts = tmp_path / "counts"
    counts.touch()
    pipeline = Pipeline(
        source=CountingSource(str(counts)),
        transform=build_transform([{"name": "resize", "size": 4}]),
        batch_size=BATCH_SIZE,
        prefetch=3,
        num_threads=threads,
        num_workers=workers,
    )
    batches, num_read = pipeline.batches(), -1
    next(batches)
    while num_read < counts.stat().st_size:  # until no more records are read
        num_read = counts.stat().st_size
        time.sleep(0.7)
    assert 2 <= num_read / BATCH_SIZE <= 1 + max_ahead
    batches.close()


def test_order_of_records_is_pinned(make_pipeline):
    """A checkpoint's step must select the same batch after an update of the code or of Grain."""
    stream = np.concatenate([b["index"] for b in take(make_pipeline(transform=None), 0, 6)])
    assert stream[:16].tolist() == [18, 33, 12, 36, 34, 16, 22, 21, 31, 1, 3, 8, 24, 0, 28, 10]
    assert stream[37:41].tolist() == [19, 34, 8, 2]  # the second epoch


def test_prefixes_precede_captions_and_are_not_targets(make_pipeline, tokenizer):
    prefix = "key"
    (batch,) = take(make_pipeline(caption_weights={"name": 1.0}, prefixes={"name": prefix}), 0, 1)
    prompt = tokenizer.prompt_ids(prefix)
    assert (batch["text"][:, : len(prompt)] == prompt).all()
    assert not batch["target_mask"][:, : len(prompt)].any()
    text_mask = batch["text_mask"][:, len(prompt) :]
    np.testing.assert_array_equal(batch["target_mask"][:, len(prompt) :], text_mask)
    with pytest.raises(ValueError, match="prefixes for the caption sets \\['nmae'\\]"):
        make_pipeline(prefixes={"nmae": "key"})
