"""Caption metrics equal those of pycocoevalcap 1.2 on random token sequences."""

from __future__ import annotations

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from imgtune_jax.evals.caption_metrics import TOKEN_METRICS


@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_pycocoevalcap(seed):
    rng = np.random.default_rng(seed)
    words = np.array(["a", "the", "red", "cat", "dog", "on", "with", "sits", "two", "café", "狐"])

    def sentence():
        return words[rng.integers(0, len(words), rng.integers(0, 14))].tolist()

    candidates = [sentence() for _ in range(80)]
    references = [[sentence() for _ in range(rng.integers(1, 6))] for _ in candidates]
    for candidate, image_references in zip(candidates, references, strict=True):
        image_references.append(candidate[: rng.integers(0, 14)])  # so that some n-grams match
    candidate_texts = {i: [" ".join(candidate)] for i, candidate in enumerate(candidates)}
    reference_texts = {
        i: [" ".join(reference) for reference in image_references]
        for i, image_references in enumerate(references)
    }
    bleus = Bleu(4).compute_score(reference_texts, candidate_texts, verbose=0)[0]
    expected = {f"Bleu_{n}": value for n, value in enumerate(bleus, 1)}
    expected["ROUGE_L"] = Rouge().compute_score(reference_texts, candidate_texts)[0]
    expected["CIDEr"] = Cider().compute_score(reference_texts, candidate_texts)[0]
    actual = {}
    for name in ("bleu", "rouge_l", "cider"):
        actual |= TOKEN_METRICS[name](candidates, references)
    assert actual == pytest.approx(expected, rel=1e-12)
    assert 0.1 < actual["Bleu_4"] < 0.9
