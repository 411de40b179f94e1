from collections import Counter

import numpy as np
import pytest

from imgtune_jax.data import BadRecord, CaptionSampler, FaultCause, Record

RECORD = Record("k", captions={"name": ("fox",), "keywords": ("red", "animal"), "empty": ()})


def sample_counts(sampler, record=RECORD, n=4000):
    rng = np.random.default_rng(0)
    return Counter(sampler(record, rng).text for _ in range(n))


def test_sets_are_sampled_by_weight_and_their_captions_uniformly():
    counts = sample_counts(CaptionSampler({"name": 7, "keywords": 3}))
    for caption, probability in (("fox", 0.7), ("red", 0.15), ("animal", 0.15)):
        deviation = (probability * (1 - probability) / 4000) ** 0.5  # of the mean of 4000 samples
        assert abs(counts[caption] / 4000 - probability) < 4 * deviation


def test_sets_that_the_record_lacks_are_not_sampled():
    counts = sample_counts(
        CaptionSampler({"name": 1.0, "empty": 5.0, "absent": 5.0, "keywords": 0.0})
    )
    assert set(counts) == {"fox"}


def test_templates_apply_to_their_set_only():
    sampler = CaptionSampler(
        {"name": 0.5, "keywords": 0.5}, templates={"name": ("a photo of a {}.", "{}!")}
    )
    assert set(sample_counts(sampler)) == {"a photo of a fox.", "fox!", "red", "animal"}
    assert sampler.first(RECORD).text == "fox"


def test_first_caption_is_from_the_available_set_with_the_largest_weight():
    assert CaptionSampler({"name": 0.3, "keywords": 0.7}).first(RECORD).text == "red"
    assert CaptionSampler({"name": 0.3, "absent": 0.7}).first(RECORD).text == "fox"


def test_a_record_without_captions_is_bad():
    rng = np.random.default_rng(0)
    with pytest.raises(BadRecord) as caught:
        CaptionSampler({"empty": 1})(RECORD, rng)
    assert caught.value.cause is FaultCause.MISSING_CAPTION
    unreadable = Record("k", faults={"captions": BadRecord(FaultCause.BAD_UTF8, "x")})
    with pytest.raises(BadRecord) as caught:
        CaptionSampler({"name": 1})(unreadable, rng)
    assert caught.value.cause is FaultCause.BAD_UTF8


def test_invalid_settings_are_errors_that_name_them():
    for weights in ({}, {"name": 0.0}, {"name": -1.0, "b": 3.0}):
        with pytest.raises(ValueError, match="at least one above 0"):
            CaptionSampler(weights)
    with pytest.raises(ValueError, match="expected one"):
        CaptionSampler({"name": 1}, templates={"name": ("a photo",)})
    with pytest.raises(ValueError, match="no weight"):
        CaptionSampler({"name": 1}, templates={"nmae": ("{}",)})
    with pytest.raises(ValueError, match=r"no caption sets \['nmae'\]"):
        CaptionSampler({"nmae": 1}).check(("name",))
