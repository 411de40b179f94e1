"""BLEU, ROUGE-L and CIDEr-D equal pycocoevalcap 1.2; the other metrics have stated properties."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
from sacrebleu.metrics import CHRF

from imgtune_jax.evals import caption_metrics
from imgtune_jax.evals.caption_metrics import compute_metrics, java
from imgtune_jax.evals.caption_metrics.tokens import normalize_text, simple_tokens

PACKAGE = Path(caption_metrics.__file__).parent
GOLDEN = json.loads((Path(__file__).parents[1] / "golden/evals_captions.json").read_text("utf-8"))
COCO_METRICS = ("bleu", "rouge_l", "cider")
needs_java = pytest.mark.skipif(
    not (importlib.util.find_spec("pycocoevalcap") and shutil.which("java")),
    reason="needs Java and the extra [java]",
)


@pytest.mark.parametrize("case", GOLDEN["scored"])
def test_metrics_equal_pycocoevalcap(case):
    stored = GOLDEN["scored"][case]
    predictions = [p.split() for p in stored["predictions"]]
    references = [[r.split() for r in row] for row in stored["references"]]
    for name in COCO_METRICS:
        for key, value in caption_metrics.TOKEN_METRICS[name](predictions, references).items():
            assert value == pytest.approx(stored["scores"][key], rel=1e-12, abs=1e-15), key


def test_simple_tokens_equal_ptb_tokens_on_plain_captions():
    stored = GOLDEN["tokenized"]
    assert dict(zip(stored, simple_tokens(list(stored)), strict=True)) == stored


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A型血 狐狸。", ["a", "型", "血", "狐", "狸"]),
        ("ラーメン、2杯", ["ラ", "ー", "メ", "ン", "2", "杯"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("खून का प्रकार", ["खून", "का", "प्रकार"]),  # vowel signs are part of the word
        ("زر A، فئة", ["زر", "a", "فئة"]),
        ("A button (blood type)", ["a", "button", "blood", "type"]),
        ("ONE ✨ star", ["one", "✨", "star"]),
        ("e\u0301t\u00e9", ["été"]),
    ],
)
def test_simple_tokens_of_many_scripts(text, tokens):
    assert simple_tokens([text]) == [tokens]


@needs_java
def test_ptb_tokenization_and_meteor_equal_pycocoevalcap():
    stored = GOLDEN["whole"]
    got = compute_metrics(
        stored["predictions"],
        stored["references"],
        metrics=(*COCO_METRICS, "meteor"),
        tokenization="ptb",
    )
    assert got == pytest.approx(stored["scores"], rel=1e-12, abs=1e-15)


SEPARATORS = ("\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029")


@pytest.fixture
def java_lines(monkeypatch):
    """Replace the PTB tokenizer by one that splits its input into lines as Java does."""
    lines = []

    class PTBTokenizer:
        def tokenize(self, captions):
            text = "\n".join(row[0]["caption"] for row in captions.values())
            text.encode()  # to Java
            lines[:] = text.splitlines()
            return {i: [line] for i, line in zip(captions, lines, strict=False)}

    module = types.ModuleType("ptbtokenizer")
    module.PTBTokenizer = PTBTokenizer
    monkeypatch.setitem(sys.modules, "pycocoevalcap.tokenizer.ptbtokenizer", module)
    monkeypatch.setattr(java, "require_java", lambda: None)
    return lines


@pytest.mark.parametrize("separator", [*SEPARATORS, "\ud800"])
def test_line_separator_in_a_caption_does_not_shift_the_next_ones(java_lines, separator):
    texts = [f"a{separator}b", "c", f"{separator}", "d"]
    got = java.ptb_tokens(texts)
    assert len(java_lines) == len(texts) + 1
    assert [got[1], got[3]] == [["c"], ["d"]]
    assert got[0] == ["a", "b"] or separator == "\ud800"


def test_shifted_lines_of_the_java_tokenizer_raise(java_lines, monkeypatch):
    monkeypatch.setattr(java, "_one_line", lambda text: text)
    with pytest.raises(ValueError, match="did not return one line for each of the 2 texts"):
        java.ptb_tokens(["a\u2028b", "c"])


def test_missing_java_or_package_error_names_what_to_install(monkeypatch):
    monkeypatch.setattr(java.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"need Java .a `java` on the path"):
        compute_metrics(["a"], [["a"]], metrics=["bleu"], tokenization="ptb")
    monkeypatch.setattr(java.shutil, "which", lambda name: "/bin/java")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'imgtune-jax\[java\]'"):
        compute_metrics(["a"], [["a"]], metrics=["meteor"])


def test_chrf_uses_the_best_of_any_number_of_references():
    predictions = ["A red cat", "собака", "狐狸"]
    references = [["a red cap", "cats", "one red cat"], ["кошка"], ["狐", "白狐狸"]]
    padded = [[row[i] if i < len(row) else None for row in references] for i in range(3)]
    got = compute_metrics(predictions, references, metrics=["chrf"])
    assert got == {"chrF": CHRF(lowercase=True).corpus_score(predictions, padded).score}
    perfect = compute_metrics(predictions, [[p] for p in predictions], metrics=["chrf"])
    assert perfect["chrF"] == 100


@pytest.mark.parametrize(
    ("prediction", "reference", "equal"),
    [
        ("A Button ( blood type )", "a button (blood type)", True),
        ("t - shirt", "T-shirt", True),
        ("ＡＢ型", "ab型", True),  # NFKC: full-width letters
        ("keycap: #", "keycap: *", False),
        ("red cat", "redcat", False),
        ("", "…", True),
    ],
)
def test_exact_match_ignores_only_case_and_punctuation(prediction, reference, equal):
    got = compute_metrics([prediction], [["another", reference]], metrics=["exact_match"])
    assert got == {"exact_match": float(equal)}
    assert (normalize_text(prediction) == normalize_text(reference)) is equal


def test_unknown_names_and_mismatched_lengths_raise():
    with pytest.raises(ValueError, match=r"unknown caption metrics \['blue'\]; known: bleu"):
        compute_metrics(["a"], [["a"]], metrics=["blue"])
    with pytest.raises(ValueError, match="tokenization = 'x'; known: simple, ptb"):
        compute_metrics(["a"], [["a"]], metrics=["bleu"], tokenization="x")
    for predictions, references in (([], []), (["a"], [["a"], ["b"]]), (["a"], [[]])):
        with pytest.raises(ValueError, match="expected one caption and at least one reference"):
            compute_metrics(predictions, references, metrics=["bleu"])


def test_tables_have_a_metric_from_every_file():
    files = {
        Path(f.__code__.co_filename).name
        for table in (caption_metrics.TOKEN_METRICS, caption_metrics.STRING_METRICS)
        for f in table.values()
    }
    assert {p.name for p in PACKAGE.glob("*.py")} - files == {"__init__.py", "tokens.py"}
