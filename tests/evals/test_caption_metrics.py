"""BLEU, ROUGE-L and CIDEr-D against pycocoevalcap 1.2, and what our own scores promise."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from sacrebleu.metrics import CHRF

from imgtune_jax.evals import caption_metrics
from imgtune_jax.evals.caption_metrics import compute_metrics, java
from imgtune_jax.evals.caption_metrics.tokens import normalize_text, simple_tokens

ROOM = Path(caption_metrics.__file__).parent
GOLDEN = json.loads((Path(__file__).parents[1] / "golden/evals_captions.json").read_text("utf-8"))
OF_COCO = ("bleu", "rouge_l", "cider")
needs_java = pytest.mark.skipif(
    not (importlib.util.find_spec("pycocoevalcap") and shutil.which("java")),
    reason="the extra [java] is not installed",
)


@pytest.mark.parametrize("case", GOLDEN["scored"])
def test_scores_equal_pycocoevalcaps(case):
    stored = GOLDEN["scored"][case]
    said = [p.split() for p in stored["predictions"]]
    wanted = [[r.split() for r in own] for own in stored["references"]]
    for name in OF_COCO:
        for key, value in caption_metrics.TOKEN_METRICS[name](said, wanted).items():
            assert value == pytest.approx(stored["scores"][key], rel=1e-12, abs=1e-15), key


def test_simple_tokens_are_ptbs_on_plain_captions():
    stored = GOLDEN["tokenized"]
    assert dict(zip(stored, simple_tokens(list(stored)), strict=True)) == stored


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A型血 狐狸。", ["a", "型", "血", "狐", "狸"]),
        ("ラーメン、2杯", ["ラ", "ー", "メ", "ン", "2", "杯"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("खून का प्रकार", ["खून", "का", "प्रकार"]),  # vowel signs belong to their word
        ("زر A، فئة", ["زر", "a", "فئة"]),
        ("A button (blood type)", ["a", "button", "blood", "type"]),
        ("ONE ✨ star", ["one", "✨", "star"]),
        ("e\u0301t\u00e9", ["été"]),
    ],
)
def test_simple_tokens_of_other_scripts(text, tokens):
    assert simple_tokens([text]) == [tokens]


@needs_java
def test_with_java_the_whole_evaluation_equals_pycocoevalcaps():
    stored = GOLDEN["whole"]
    got = compute_metrics(
        stored["predictions"],
        stored["references"],
        metrics=(*OF_COCO, "meteor"),
        tokenization="ptb",
    )
    assert got == pytest.approx(stored["scores"], rel=1e-12, abs=1e-15)


def test_without_java_or_its_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(java.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"need Java .a `java` on the path"):
        compute_metrics(["a"], [["a"]], metrics=["bleu"], tokenization="ptb")
    monkeypatch.setattr(java.shutil, "which", lambda name: "/bin/java")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'imgtune-jax\[java\]'"):
        compute_metrics(["a"], [["a"]], metrics=["meteor"])


def test_chrf_takes_the_best_of_any_number_of_references():
    said = ["A red cat", "собака", "狐狸"]
    wanted = [["a red cap", "cats", "one red cat"], ["кошка"], ["狐", "白狐狸"]]
    padded = [[own[i] if i < len(own) else None for own in wanted] for i in range(3)]
    got = compute_metrics(said, wanted, metrics=["chrf"])
    assert got == {"chrF": CHRF(lowercase=True).corpus_score(said, padded).score}
    assert compute_metrics(said, [[s] for s in said], metrics=["chrf"])["chrF"] == 100


@pytest.mark.parametrize(
    ("said", "wanted", "equal"),
    [
        ("A Button ( blood type )", "a button (blood type)", True),
        ("t - shirt", "T-shirt", True),
        ("ＡＢ型", "ab型", True),  # NFKC: full-width letters
        ("keycap: #", "keycap: *", False),
        ("red cat", "redcat", False),
        ("", "…", True),
    ],
)
def test_exact_match_forgives_case_and_punctuation_only(said, wanted, equal):
    got = compute_metrics([said], [["another", wanted]], metrics=["exact_match"])
    assert got == {"exact_match": float(equal)}
    assert (normalize_text(said) == normalize_text(wanted)) is equal


def test_wrong_names_and_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match=r"no caption metric \['blue'\]; known: bleu"):
        compute_metrics(["a"], [["a"]], metrics=["blue"])
    with pytest.raises(ValueError, match="tokenization = 'x'; known: simple, ptb"):
        compute_metrics(["a"], [["a"]], metrics=["bleu"], tokenization="x")
    for said, wanted in (([], []), (["a"], [["a"], ["b"]]), (["a"], [[]])):
        with pytest.raises(ValueError, match="expected one caption and at least one reference"):
            compute_metrics(said, wanted, metrics=["bleu"])


def test_every_score_is_in_a_table():
    files = {
        Path(f.__code__.co_filename).name
        for table in (caption_metrics.TOKEN_METRICS, caption_metrics.STRING_METRICS)
        for f in table.values()
    }
    assert {p.name for p in ROOM.glob("*.py")} - files == {"__init__.py", "tokens.py"}
