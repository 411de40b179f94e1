"""Bad records of every cause are counted, logged and masked, and the run continues."""

import io
import itertools
import json
import logging

import numpy as np
import pytest
from PIL import Image

from imgtune_jax.data import (
    BadRecord,
    BadRecordCounter,
    Fault,
    FaultCause,
    Pipeline,
    TooManyBadRecordsError,
)
from tests.data.conftest import build_tar_source, encode, valid_files, write_tar


def decompression_bomb():
    out = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(out, "PNG")
    return out.getvalue()


def float_image():
    out = io.BytesIO()
    Image.new("F", (4, 4)).save(out, "TIFF")
    return out.getvalue()


def bad_files():
    damaged = bytearray(encode(1))
    damaged[200:260] = bytes(60)
    metadata = json.dumps({"name": "a thing", "keywords": [], "group": 0}).encode()
    images = {
        "truncated_image": encode(0, "JPEG", (60, 60))[:900],
        "not_an_image": b"<html>404 not found</html>",
        "too_many_pixels": decompression_bomb(),
        "undecodable_image": bytes(damaged),
        "unsupported_image": float_image(),
    }
    files = {}
    for cause, data in images.items():
        files[f"{cause}.png"] = data
        files[f"{cause}.json"] = metadata
    files["missing_image.json"] = metadata
    for cause, data in {
        "missing_caption": b'{"name": " ", "group": 0}',
        "bad_utf8": b'{"name": "\xff\xfe", "group": 0}',
        "bad_metadata": b"{not json",
    }.items():
        files[f"{cause}.png"] = encode(2)
        files[f"{cause}.json"] = data
    return files


CAUSES = {
    "truncated_image", "not_an_image", "too_many_pixels", "undecodable_image",
    "unsupported_image", "missing_image", "missing_caption", "bad_utf8", "bad_metadata",
}  # fmt: skip


@pytest.fixture(scope="module")
def bad_source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    return build_tar_source(write_tar(folder / "b.tar", valid_files(15) | bad_files()))


@pytest.fixture
def make_bad_pipeline(bad_source, tokenizer, augment):
    def build(**changes):
        fields = dict(
            source=bad_source, transform=augment, tokenizer=tokenizer, batch_size=12,
            caption_weights={"name": 1.0, "keywords": 1.0}, num_threads=2, max_bad_fraction=0.5,
        )  # fmt: skip
        return Pipeline(**(fields | changes))

    return build


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_every_cause_is_counted_logged_and_masked(make_bad_pipeline, caplog, workers):
    pipeline = make_bad_pipeline(num_workers=workers)
    with caplog.at_level(logging.WARNING, "imgtune_jax.data"):
        batches = list(itertools.islice(pipeline.batches(0), 4))  # two epochs of 24
    assert pipeline.bad_records() == {"seen": 48, **dict.fromkeys(sorted(CAUSES), 2)}
    for cause in CAUSES:
        logged = [m for m in caplog.messages if f"b.tar:{cause}." in m and f" {cause}: " in m]
        assert len(logged) == 1, cause  # once, although the record occurs twice
    mask = np.concatenate([b["example_mask"] for b in batches])
    assert mask.tolist() == ([True] * 15 + [False] * 9) * 2
    for batch in batches:
        bad = ~batch["example_mask"]
        assert not batch["image"][bad].any() and not batch["text"][bad].any()
        assert not batch["text_mask"][bad].any() and (batch["group"][bad] == -1).all()
        good = batch["example_mask"]
        assert batch["image"][good].any(axis=(1, 2, 3)).all()
        assert batch["text_mask"][good].any(axis=1).all()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_records_do_not_change_the_other_rows(make_bad_pipeline, source):
    """Rows of valid records are the same in a batch with bad records and in one without."""
    (with_bad,) = itertools.islice(make_bad_pipeline(batch_size=24).batches(0), 1)
    (valid,) = itertools.islice(make_bad_pipeline(source=source, batch_size=24).batches(0), 1)
    np.testing.assert_array_equal(with_bad["image"][:15], valid["image"][:15])
    np.testing.assert_array_equal(with_bad["text"][:15], valid["text"][:15])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_bad_records_are_an_error_that_names_examples(make_bad_pipeline):
    pipeline = make_bad_pipeline(max_bad_fraction=0.3, max_bad_fraction_after=24)
    batches = pipeline.batches(0)
    next(batches)
    with pytest.raises(TooManyBadRecordsError) as caught:
        next(batches)
    message = str(caught.value)
    assert message.startswith("9 of 24 records are bad (37.5%, allowed 30.0%)")
    for cause in CAUSES:
        assert f"1 {cause} (such as b.tar:{cause}." in message
    assert "max_bad_fraction" in message


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_captions_are_not_read_without_a_tokenizer(make_bad_pipeline):
    pipeline = make_bad_pipeline(tokenizer=None, caption_weights={})
    list(pipeline.one_pass())
    caption_causes = {"missing_caption", "bad_utf8", "bad_metadata"}
    assert set(pipeline.bad_records()) == {"seen"} | (CAUSES - caption_causes)


def test_a_batch_with_only_bad_records_has_the_usual_shape(make_bad_pipeline, tmp_path):
    files = {f"{i}.png": b"no image" for i in range(4)}
    files |= {f"{i}.json": b'{"name": "x", "group": 1}' for i in range(4)}
    source = build_tar_source(write_tar(tmp_path / "a.tar", files))
    pipeline = make_bad_pipeline(source=source, batch_size=4, max_bad_fraction=1.0)
    (batch,) = itertools.islice(pipeline.batches(0), 1)
    assert batch["image"].shape == (4, 12, 12, 3) and not batch["example_mask"].any()


def build_source_of_broken_images(path, *, good=0):
    """Return a source of four broken images after `good` valid records."""
    files = valid_files(good)
    files |= {f"{900 + i}.png": b"no image" for i in range(4)}
    files |= {f"{900 + i}.json": b'{"name": "x", "group": 1}' for i in range(4)}
    return build_tar_source(write_tar(path, files))


def test_source_without_a_usable_record_is_an_error_that_names_the_causes(
    make_bad_pipeline, tmp_path
):
    broken = build_source_of_broken_images(tmp_path / "broken.tar")
    message = r"none of the first 4 records can be used: 4 not_an_image; for example broken.tar:90"
    with pytest.raises(ValueError, match=message):
        make_bad_pipeline(source=broken, batch_size=4).check_records()
    mixed = build_source_of_broken_images(tmp_path / "mixed.tar", good=1)
    make_bad_pipeline(source=mixed, batch_size=4).check_records()  # one record is usable


def test_limit_is_checked_after_one_epoch_of_a_small_source(make_bad_pipeline, tmp_path):
    source = build_source_of_broken_images(tmp_path / "a.tar", good=4)
    pipeline = make_bad_pipeline(source=source, batch_size=4, max_bad_fraction=0.4)
    batches = pipeline.batches(0)
    next(batches)
    with pytest.raises(TooManyBadRecordsError, match="4 of 8 records are bad"):
        next(batches)


def test_counter_logs_five_keys_and_waits_for_enough_records(caplog):
    counter = BadRecordCounter(max_bad_fraction=0.1, max_bad_fraction_after=100)
    faults = [Fault(f"k{i}", FaultCause.NOT_AN_IMAGE, "x") for i in range(9)]
    counter.add(9, faults)  # all are bad, but nine are too few to raise an error
    logged = [m for m in caplog.messages if m.startswith("bad record")]
    assert len(logged) == 5 and "counted, not logged" in caplog.messages[-1]
    # Now 10 of 100 are bad: at the limit, not above it.
    counter.add(91, [Fault("k9", FaultCause.BAD_UTF8, "x")])
    assert counter.summary() == {"seen": 100, "bad_utf8": 1, "not_an_image": 9}
    with pytest.raises(TooManyBadRecordsError, match="11 of 101"):
        counter.add(1, [Fault("k10", FaultCause.BAD_UTF8, "x")])


def test_a_source_may_raise_bad_record_for_a_whole_record(make_bad_pipeline, source):
    class Failing:
        caption_sets, fingerprint = source.caption_sets, "failing"

        def __len__(self):
            return 4

        def __getitem__(self, index):
            if index == 2:
                raise BadRecord(FaultCause.UNREADABLE_FILE, "no such row")
            return source[index]

    pipeline = make_bad_pipeline(source=Failing(), batch_size=4)
    (batch,) = itertools.islice(pipeline.batches(0), 1)
    assert batch["example_mask"].tolist() == [True, True, False, True]
    assert pipeline.bad_records() == {"seen": 4, "unreadable_file": 1}


def test_caption_path_that_ends_in_a_group_is_a_fault_that_lists_its_fields(tmp_path):
    files = {"0.png": encode(0), "0.json": b'{"name": {"en": "a fox", "de": "ein Fuchs"}}'}
    source = build_tar_source(write_tar(tmp_path / "a.tar", files))
    record = source[0]
    assert "a group with the fields en, de" in str(record.faults["captions"])
    assert not record.captions
