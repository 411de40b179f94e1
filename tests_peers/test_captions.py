"""Our caption scores against pycocoevalcap 1.2's own, on random token sequences."""

from __future__ import annotations

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from imgtune_jax.evals.caption_metrics import TOKEN_METRICS


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_pycocoevalcaps(seed):
    rng = np.random.default_rng(seed)
    words = np.array(["a", "the", "red", "cat", "dog", "on", "with", "sits", "two", "café", "狐"])

    def sentence():
        return words[rng.integers(0, len(words), rng.integers(0, 14))].tolist()

    said = [sentence() for _ in range(80)]
    wanted = [[sentence() for _ in range(rng.integers(1, 6))] for _ in said]
    for own, prediction in zip(wanted, said, strict=True):
        own.append(prediction[: rng.integers(0, 14)])  # some n-grams match
    predictions = {i: [" ".join(s)] for i, s in enumerate(said)}
    references = {i: [" ".join(r) for r in own] for i, own in enumerate(wanted)}
    bleus = Bleu(4).compute_score(references, predictions, verbose=0)[0]
    want = {f"Bleu_{n}": value for n, value in enumerate(bleus, 1)}
    want["ROUGE_L"] = Rouge().compute_score(references, predictions)[0]
    want["CIDEr"] = Cider().compute_score(references, predictions)[0]
    got = {}
    for name in ("bleu", "rouge_l", "cider"):
        got |= TOKEN_METRICS[name](said, wanted)
    assert got == pytest.approx(want, rel=1e-12)
    assert 0.1 < got["Bleu_4"] < 0.9
