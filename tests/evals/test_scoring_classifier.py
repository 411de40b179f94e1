from __future__ import annotations

import numpy as np
import pytest

from imgtune_jax.evals.scoring_classifier import ScoringClassifier

# log p for three readable images, the second one a dog's.
LOGP = {"cat": [-1, -3, -2], "a cat": [-9, -3, -1], "dog": [-2, -2.6, -4]}


def source(fakes):
    """A record's image picks its row of LOGP; the last one is broken."""
    images = [*np.eye(3), None]
    return [fakes.record(x, label=y) for x, y in zip(images, (0, 1, 0, 1), strict=True)]


def encoders(fakes, prefix=""):
    return fakes.Encoders({prefix + t: np.array(x, np.float32) for t, x in LOGP.items()})


def test_the_likeliest_name_is_the_class(fakes):
    got = ScoringClassifier(source(fakes), ("cat", "dog"))(encoders(fakes))
    assert (got["acc1"], got["num_images"], got["num_broken"]) == (1.0, 3, 1)


def test_prompts_of_a_class_count_by_the_mean_of_their_probabilities(fakes):
    """A sum would call the second image a cat: 2 e^-3 > e^-2.6 > e^-3. A mean of logarithms would
    call the first one a dog."""
    fake, prompts = encoders(fakes), {"cat": ["cat", "a cat"], "dog": ["dog"]}
    assert ScoringClassifier(source(fakes), ("cat", "dog"), prompts)(fake)["acc1"] == 1.0
    assert fake.asked == [(["cat", "a cat", "dog"], False)]


def test_prefix_and_length_normalisation_go_to_the_model(fakes):
    fake = encoders(fakes, prefix="<en>")
    got = ScoringClassifier(source(fakes), ("cat", "dog"), prefix="<en>", normalize_length=True)(
        fake
    )
    assert got["acc1"] == 1.0 and fake.asked == [(["cat", "dog"], True)]


def test_a_log_probability_that_is_not_finite_is_an_error(fakes):
    fake = encoders(fakes)
    fake.text_emb["dog"][1] = np.nan
    with pytest.raises(ValueError, match="log probabilities"):
        ScoringClassifier(source(fakes), ("cat", "dog"))(fake)
