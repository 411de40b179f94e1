"""Generate `evals_captions.json`: scores and PTB tokens of captions by pycocoevalcap 1.2.

    python -m venv peers && peers/bin/pip install "numpy<3"
    peers/bin/pip install --no-deps pycocoevalcap==1.2
    peers/bin/python tests/golden/evals_captions.py        (needs Java)

Captions under the key `scored` are tokens joined by spaces. Captions under `tokenized` and `whole`
are plain text.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

WORDS = [
    "a",
    "the",
    "red",
    "cat",
    "dog",
    "on",
    "with",
    "sits",
    "two",
    "of",
    "café",
    "狐狸",
    "вокзал",
    "खून",
]
PLAIN = (
    "A man's dog isn't on the T-shirt.",
    "It's a \"big\" 'thing'... really?",
    "A black-and-white photo; five o'clock, maybe",
    "I'll say they've gone, we're late, I'd go and I'm sure you don't.",
    "Two women -- one tall – walk at 3:30 p.m. with $3.50 & a 50% chance",
    "keycap: #",
    "café, Côte d'Ivoire: l'eau!",
    "rock it’s “quoted”",
    "кошка, с сердечками.",
    "दिल वाली आँखें, खून",
    "the U.S. flag; 10,000 fans",
    "hello,world",
    "a + b = c",
    "",
    "   ",
    "1st place of 3/4 in the 1990s",
)
CAPTIONS = {
    "A dog runs on the beach.": ["A dog is running along the beach.", "Dogs ran over sand!"],
    "the cat's asleep": ["A sleeping cat", "The cat is asleep.", "cats"],
    "": ["Nobody said anything."],
    "Two red (ripe) apples": ["two ripe, red apples"],
}


def scores(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """Return BLEU, ROUGE-L and CIDEr, under the names that pycocoevalcap reports."""
    candidates = {i: [p] for i, p in enumerate(predictions)}
    by_image = dict(enumerate(references))
    bleus = Bleu(4).compute_score(by_image, candidates, verbose=0)[0]
    out = {f"Bleu_{n}": value for n, value in enumerate(bleus, 1)}
    out["ROUGE_L"] = float(Rouge().compute_score(by_image, candidates)[0])
    out["CIDEr"] = float(Cider().compute_score(by_image, candidates)[0])
    return out


def case(predictions: list[str], references: list[list[str]]) -> dict:
    """Return a golden case: the captions, the references and their scores."""
    return {
        "predictions": predictions,
        "references": references,
        "scores": scores(predictions, references),
    }


def random_case(seed: int, images: int, *, empty: float = 0.0) -> dict:
    """Sample one prediction and one to five references, which share words, per image."""
    rng = random.Random(seed)

    def sentence() -> list[str]:
        return rng.choices(WORDS, k=rng.randint(1, 12))

    def perturb(words: list[str]) -> str:
        if rng.random() < empty:
            return ""
        shared = [w for w in words if rng.random() < 0.8]
        return " ".join(shared + rng.choices(WORDS, k=rng.randint(0, 3)))

    sentences = [sentence() for _ in range(images)]
    references = [[perturb(words) for _ in range(rng.randint(1, 5))] for words in sentences]
    return case([perturb(words) for words in sentences], references)


def tokenize(texts: list[str]) -> list[list[str]]:
    """Return PTB tokens. The last line is not empty, because PTB drops empty lines at the end."""
    lines = dict(enumerate([*texts, "end"]))
    tokens = PTBTokenizer().tokenize({i: [{"caption": t}] for i, t in lines.items()})
    return [tokens[i][0].split() for i in range(len(texts))]


def with_meteor() -> dict:
    """Return CAPTIONS and the scores, with METEOR, of their PTB tokens."""
    predictions = [" ".join(t) for t in tokenize(list(CAPTIONS))]
    references = [[" ".join(t) for t in tokenize(row)] for row in CAPTIONS.values()]
    candidates = {i: [p] for i, p in enumerate(predictions)}
    meteor = Meteor().compute_score(dict(enumerate(references)), candidates)
    return {
        "predictions": list(CAPTIONS),
        "references": list(CAPTIONS.values()),
        "scores": scores(predictions, references) | {"METEOR": float(meteor[0])},
    }


if __name__ == "__main__":
    golden = {
        "scored": {
            "many": random_case(0, 40),
            "some_empty": random_case(1, 30, empty=0.2),
            "one_image": random_case(2, 1),
            "nothing_said": case(["", ""], [["a cat", ""], ["a red dog on the sand"]]),
            "repeated": case(["the the the the the", "a cat"], [["the cat", "a"], ["a cat"]]),
            "perfect": case(["a red cat sits", "two dogs of café"], [["a red cat sits"],
                                                                    ["two dogs of café"]]),
        },
        "tokenized": dict(zip(PLAIN, tokenize(list(PLAIN)), strict=True)),
        "whole": with_meteor(),
    }  # fmt: skip
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(golden, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
