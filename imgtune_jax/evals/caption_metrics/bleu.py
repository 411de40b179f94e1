"""BLEU of captions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from imgtune_jax.evals.caption_metrics.tokens import Tokens, ngrams

NGRAM_ORDERS = (1, 2, 3, 4)
# What pycocoevalcap adds in the place of a special case for nothing matched or nothing said.
TINY, SMALL = 1e-15, 1e-9


def bleu(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, float]:
    """`Bleu_1` to `Bleu_4` of a corpus, in [0, 1] (Papineni et al., P02-1040).

    Clipped n-gram counts, summed over images before they are divided; the brevity penalty is
    against the closest reference length of each image, the shorter one of a tie. Equal to
    pycocoevalcap 1.2's.
    """
    matched, said = dict.fromkeys(NGRAM_ORDERS, 0), dict.fromkeys(NGRAM_ORDERS, 0)
    length = wanted = 0
    for prediction, own in zip(predictions, references, strict=True):
        length += len(prediction)
        wanted += min((abs(len(r) - len(prediction)), len(r)) for r in own)[1]
        for n in NGRAM_ORDERS:
            counts, most = Counter(ngrams(prediction, n)), Counter()
            for reference in own:
                most |= Counter(ngrams(reference, n))
            matched[n] += (counts & most).total()
            said[n] += counts.total()
    ratio = (length + TINY) / (wanted + SMALL)
    brevity = math.exp(min(0.0, 1 - 1 / ratio))
    scores, product = {}, 1.0
    for n in NGRAM_ORDERS:
        product *= (matched[n] + TINY) / (said[n] + SMALL)
        scores[f"Bleu_{n}"] = product ** (1 / n) * brevity
    return scores
