from __future__ import annotations

import json
import math

import pytest

from imgtune_jax.data import Subset, evenly_spaced
from imgtune_jax.evals.captioning import Captioning
from imgtune_jax.evals.results import evaluator_result


def toy(fakes):
    """Five records: one without a German reference, one broken; three to judge."""
    record = fakes.record
    return Records(
        [
            record("ein Hund", de=("ein Hund", "der Hund"), en=("a dog",)),
            record("nichts", en=("nothing",)),
            record(None, de=("kaputt",)),
            record("Katze", de=("eine Katze",)),
            record("rot", de=("Rot!",)),
        ]
    )


class Records(list):
    fingerprint = "toy"


def test_captions_are_judged_against_all_references_of_the_set(fakes):
    encoders = fakes.Encoders()
    evaluator = Captioning(
        toy(fakes), caption_set="de", decoding={"max_new_tokens": 4}, language="de"
    )
    got = evaluator(encoders)
    assert got["exact_match"] == pytest.approx(2 / 3)
    assert got["Bleu_1"] == pytest.approx(math.exp(1 - 5 / 4), rel=1e-6)  # "eine" is missing
    assert (got["num_images"], got["num_broken"]) == (3, 1)
    assert encoders.asked == [("", {"max_new_tokens": 4}, ["ein Hund", None, "Katze", "rot"])]


def test_perplexity_is_the_exponential_of_the_mean_nats_of_first_references(fakes):
    got = Captioning(toy(fakes), caption_set="de", metrics=("perplexity",))(fakes.Encoders())
    nats = [n for text in ("ein Hund", "eine Katze", "Rot!") for n in range(1, 1 + len(text))]
    assert got["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)))
    assert set(got) == {"perplexity", "num_images", "num_broken"}


def test_the_prefix_goes_to_the_model(fakes):
    source = Records([fakes.record("x", caption=("<de>x",))])
    assert Captioning(source, prefix="<de>")(fakes.Encoders())["exact_match"] == 1


def test_a_limit_spreads_over_the_source():
    assert evenly_spaced(10, 4) == (0, 2, 5, 7)
    assert evenly_spaced(3, 9) == evenly_spaced(3, None) == (0, 1, 2)


def test_a_limited_evaluator_judges_part_and_the_whole_on_demand(fakes):
    evaluator = Captioning(toy(fakes), caption_set="de", limit=2)
    assert evaluator.selected_images().indices == (0, 3)
    assert evaluator.selected_images(whole=True).indices == (0, 2, 3, 4)
    assert evaluator(fakes.Encoders())["num_images"] == 2


def test_a_subsets_fingerprint_tells_what_is_chosen(fakes):
    source = toy(fakes)
    prints = {Subset(source, indices).fingerprint for indices in ((0, 1), (1, 0), (0, 1, 2))}
    assert len(prints) == 3
    assert Subset(source, (3,))[0].image == "Katze" == Subset(source, (3,)).read_metadata(0).image


def test_results_have_clip_benchmarks_schema(fakes):
    evaluator = Captioning(toy(fakes), caption_set="de", language="de")
    line = evaluator_result("toy_de", evaluator, evaluator(fakes.Encoders()), model="cap", step=3)
    line = json.loads(json.dumps(line, allow_nan=False))
    assert line["task"] == "captioning" and line["language"] == "de"
    wanted = {f"Bleu_{n}" for n in (1, 2, 3, 4)} | {"ROUGE_L", "CIDEr", "chrF", "exact_match"}
    assert wanted | {"perplexity", "num_images", "num_broken"} == set(line["metrics"])


def test_what_cannot_be_judged_is_refused(fakes):
    with pytest.raises(ValueError, match="no record of 5 has a caption in the set 'fr'"):
        Captioning(toy(fakes), caption_set="fr")(fakes.Encoders())
    with pytest.raises(ValueError, match=r"no caption metric \['spice'\]"):
        Captioning(toy(fakes), metrics=("spice",))
    with pytest.raises(ValueError, match="decoding method 'bean' is unknown"):
        Captioning(toy(fakes), decoding={"method": {"name": "bean"}})
    with pytest.raises(ValueError, match="limit = 0; wanted None"):
        Captioning(toy(fakes), limit=0)
    with pytest.raises(ValueError, match="none of the 1 images could be read"):
        Captioning(Records([fakes.record(None, "x")]))(fakes.Encoders())
