"""BLEU for captions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from imgtune_jax.evals.caption_metrics.tokens import Tokens, ngrams

NGRAM_ORDERS = (1, 2, 3, 4)
# pycocoevalcap adds these to numerators and denominators, so that a count of 0 is no special case.
TINY, SMALL = 1e-15, 1e-9


def bleu(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, float]:
    """Return corpus-level `Bleu_1` to `Bleu_4`, in [0, 1] (Papineni et al., P02-1040).

    Clipped n-gram counts are summed over images before the division. For each image, the brevity
    penalty uses the reference whose length is closest to the prediction's; ties go to the shorter
    one. Equal to pycocoevalcap 1.2.
    """
    matched, predicted = dict.fromkeys(NGRAM_ORDERS, 0), dict.fromkeys(NGRAM_ORDERS, 0)
    length = reference_length = 0
    for prediction, image_references in zip(predictions, references, strict=True):
        length += len(prediction)
        reference_length += min((abs(len(r) - len(prediction)), len(r)) for r in image_references)[
            1
        ]
        for n in NGRAM_ORDERS:
            counts, max_counts = Counter(ngrams(prediction, n)), Counter()
            for reference in image_references:
                max_counts |= Counter(ngrams(reference, n))
            matched[n] += (counts & max_counts).total()
            predicted[n] += counts.total()
    ratio = (length + TINY) / (reference_length + SMALL)
    brevity = math.exp(min(0.0, 1 - 1 / ratio))
    scores, product = {}, 1.0
    for n in NGRAM_ORDERS:
        product *= (matched[n] + TINY) / (predicted[n] + SMALL)
        scores[f"Bleu_{n}"] = product ** (1 / n) * brevity
    return scores
