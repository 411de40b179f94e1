from __future__ import annotations

import numpy as np
import pytest

from imgtune_jax.evals.scoring_classifier import ScoringClassifier

# log p of each prompt for three readable images; the second image shows a dog.
LOGP = {"cat": [-1, -3, -2], "a cat": [-9, -3, -1], "dog": [-2, -2.6, -4]}


def source(fakes):
    """Return records whose image is the one-hot index into LOGP; the last one is unreadable."""
    images = [*np.eye(3), None]
    return [fakes.record(x, label=y) for x, y in zip(images, (0, 1, 0, 1), strict=True)]


def fake_predictor(fakes, prefix=""):
    return fakes.Predictor({prefix + t: np.array(x, np.float32) for t, x in LOGP.items()})


def test_predicted_class_has_the_likeliest_name(fakes):
    got = ScoringClassifier(source(fakes), ("cat", "dog"))(fake_predictor(fakes))
    assert (got["acc1"], got["num_images"], got["num_broken"]) == (1.0, 3, 1)


def test_class_score_is_the_mean_probability_of_its_prompts(fakes):
    # The sum of probabilities would classify the second image as a cat: 2 e^-3 > e^-2.6 > e^-3. The
    # mean of log probabilities would classify the first image as a dog.
    fake, prompts = fake_predictor(fakes), {"cat": ["cat", "a cat"], "dog": ["dog"]}
    assert ScoringClassifier(source(fakes), ("cat", "dog"), prompts)(fake)["acc1"] == 1.0
    assert fake.calls == [(["cat", "a cat", "dog"], False)]


def test_prefix_and_length_normalization_are_passed_to_the_predictor(fakes):
    fake = fake_predictor(fakes, prefix="<en>")
    got = ScoringClassifier(source(fakes), ("cat", "dog"), prefix="<en>", normalize_length=True)(
        fake
    )
    assert got["acc1"] == 1.0 and fake.calls == [(["cat", "dog"], True)]


def test_log_probability_that_is_not_finite_raises(fakes):
    fake = fake_predictor(fakes)
    fake.text_emb["dog"][1] = np.nan
    with pytest.raises(ValueError, match="log probabilities"):
        ScoringClassifier(source(fakes), ("cat", "dog"))(fake)
