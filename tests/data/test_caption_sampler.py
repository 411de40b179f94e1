from collections import Counter

import numpy as np
import pytest

from imgtune_jax.data import BadRecord, CaptionSampler, FaultCause, Record

RECORD = Record("k", captions={"name": ("fox",), "keywords": ("red", "animal"), "empty": ()})


def drawn(draw, record=RECORD, n=4000):
    rng = np.random.default_rng(0)
    return Counter(draw(record, rng).text for _ in range(n))


def test_sets_are_drawn_by_weight_and_alternatives_uniformly():
    found = drawn(CaptionSampler({"name": 7, "keywords": 3}))
    for caption, share in (("fox", 0.7), ("red", 0.15), ("animal", 0.15)):
        # four standard deviations of a share among 4000
        assert abs(found[caption] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_a_set_that_the_record_lacks_leaves_the_others_their_weight():
    found = drawn(CaptionSampler({"name": 1.0, "empty": 5.0, "absent": 5.0, "keywords": 0.0}))
    assert set(found) == {"fox"}


def test_templates_wrap_their_own_set():
    draw = CaptionSampler(
        {"name": 0.5, "keywords": 0.5}, templates={"name": ("a photo of a {}.", "{}!")}
    )
    assert set(drawn(draw)) == {"a photo of a fox.", "fox!", "red", "animal"}
    assert draw.first(RECORD).text == "fox"


def test_first_is_of_the_heaviest_set_present():
    assert CaptionSampler({"name": 0.3, "keywords": 0.7}).first(RECORD).text == "red"
    assert CaptionSampler({"name": 0.3, "absent": 0.7}).first(RECORD).text == "fox"


def test_no_caption_is_a_broken_record():
    rng = np.random.default_rng(0)
    with pytest.raises(BadRecord) as caught:
        CaptionSampler({"empty": 1})(RECORD, rng)
    assert caught.value.cause is FaultCause.MISSING_CAPTION
    spoiled = Record("k", faults={"captions": BadRecord(FaultCause.BAD_UTF8, "x")})
    with pytest.raises(BadRecord) as caught:
        CaptionSampler({"name": 1})(spoiled, rng)
    assert caught.value.cause is FaultCause.BAD_UTF8


def test_wrong_settings_are_named():
    for weights in ({}, {"name": 0.0}, {"name": -1.0, "b": 3.0}):
        with pytest.raises(ValueError, match="expected a weight above 0"):
            CaptionSampler(weights)
    with pytest.raises(ValueError, match="expected one"):
        CaptionSampler({"name": 1}, templates={"name": ("a photo",)})
    with pytest.raises(ValueError, match="no weight"):
        CaptionSampler({"name": 1}, templates={"nmae": ("{}",)})
    with pytest.raises(ValueError, match=r"no caption sets \['nmae'\]"):
        CaptionSampler({"nmae": 1}).check(("name",))
