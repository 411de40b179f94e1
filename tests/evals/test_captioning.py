from __future__ import annotations

import json
import math

import pytest

from imgtune_jax.data import Subset, evenly_spaced
from imgtune_jax.evals.captioning import Captioning
from imgtune_jax.evals.results import evaluator_result

ALWAYS = {"num_images", "num_broken", "same_caption", "same_reference"}


def toy_source(fakes):
    """Return five records: one has no German reference, one is unreadable, three are evaluated."""
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


def test_metrics_use_all_references_of_the_caption_set(fakes):
    predictor = fakes.Predictor()
    evaluator = Captioning(
        toy_source(fakes), caption_set="de", decoding={"max_new_tokens": 4}, language="de"
    )
    got = evaluator(predictor)
    assert got["exact_match"] == pytest.approx(2 / 3)
    assert got["Bleu_1"] == pytest.approx(
        math.exp(1 - 5 / 4), rel=1e-6
    )  # brevity penalty: "eine" is missing
    assert (got["num_images"], got["num_broken"]) == (3, 1)
    assert predictor.calls == [("", {"max_new_tokens": 4}, ["ein Hund", None, "Katze", "rot"])]


def test_perplexity_is_computed_on_first_references(fakes):
    got = Captioning(toy_source(fakes), caption_set="de", metrics=("perplexity",))(
        fakes.Predictor()
    )
    losses = [n for text in ("ein Hund", "eine Katze", "Rot!") for n in range(1, 1 + len(text))]
    assert got["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)))
    assert set(got) == {"perplexity", *ALWAYS}


def test_prefix_is_passed_to_the_predictor(fakes):
    source = Records([fakes.record("x", caption=("<de>x",))])
    assert Captioning(source, prefix="<de>")(fakes.Predictor())["exact_match"] == 1


def test_limit_spaces_images_evenly():
    assert evenly_spaced(10, 4) == (0, 2, 5, 7)
    assert evenly_spaced(3, 9) == evenly_spaced(3, None) == (0, 1, 2)


def test_limit_applies_unless_ignored(fakes):
    evaluator = Captioning(toy_source(fakes), caption_set="de", limit=2)
    assert evaluator.selected_images().indices == (0, 3)
    assert evaluator.selected_images(ignore_limit=True).indices == (0, 2, 3, 4)
    assert evaluator(fakes.Predictor())["num_images"] == 2


def test_subset_fingerprint_depends_on_the_indices(fakes):
    source = toy_source(fakes)
    fingerprints = {Subset(source, indices).fingerprint for indices in ((0, 1), (1, 0), (0, 1, 2))}
    assert len(fingerprints) == 3
    assert Subset(source, (3,))[0].image == "Katze" == Subset(source, (3,)).read_metadata(0).image


def test_results_have_the_clip_benchmark_schema(fakes):
    evaluator = Captioning(toy_source(fakes), caption_set="de", language="de")
    line = evaluator_result("toy_de", evaluator, evaluator(fakes.Predictor()), model="cap", step=3)
    line = json.loads(json.dumps(line, allow_nan=False))
    assert line["task"] == "captioning" and line["language"] == "de"
    expected = {f"Bleu_{n}" for n in (1, 2, 3, 4)} | {"ROUGE_L", "CIDEr", "chrF", "exact_match"}
    assert expected | {"perplexity", *ALWAYS} == set(line["metrics"])


def test_invalid_settings_and_empty_sources_raise(fakes):
    with pytest.raises(ValueError, match="none of the 5 records has a caption in the set 'fr'"):
        Captioning(toy_source(fakes), caption_set="fr")(fakes.Predictor())
    with pytest.raises(ValueError, match=r"unknown caption metrics \['spice'\]"):
        Captioning(toy_source(fakes), metrics=("spice",))
    with pytest.raises(ValueError, match="decoding method 'bean' is unknown"):
        Captioning(toy_source(fakes), decoding={"method": {"name": "bean"}})
    with pytest.raises(ValueError, match="limit = 0; expected None"):
        Captioning(toy_source(fakes), limit=0)
    with pytest.raises(ValueError, match="none of the 1 images could be read"):
        Captioning(Records([fakes.record(None, "x")]))(fakes.Predictor())


@pytest.mark.parametrize(
    ("captions", "references", "share", "is_logged"),
    [
        ("aaab", "abcd", 0.75, True),
        ("AAab", "abcd", 0.75, True),  # up to case
        ("aabc", "abcd", 0.5, False),
        ("aaaa", "aaab", 1.0, True),  # 75 % of the references are equal: the limit is 87.5 %
        ("aaab", "aaab", 0.75, False),
        ("aaaa", "aaaa", 1.0, False),
    ],
)
def test_caption_of_most_images_is_reported_and_logged(
    fakes, caplog, captions, references, share, is_logged
):
    pairs = zip(captions, references, strict=True)
    source = Records([fakes.record(caption, reference) for caption, reference in pairs])
    got = Captioning(source, metrics=("exact_match",))(fakes.Predictor())
    assert got["same_caption"] == share
    assert got["same_reference"] == max(map(references.count, references)) / 4
    assert (
        f"{100 * share:.0f} % of 4 images have the same caption: 'a'" in caplog.text
    ) == is_logged
