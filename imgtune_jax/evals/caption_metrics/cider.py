"""CIDEr-D of captions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from imgtune_jax.evals.caption_metrics.tokens import Tokens, ngrams

NGRAM_ORDERS = (1, 2, 3, 4)
SIGMA = 6.0  # of the Gaussian over the difference of lengths, in tokens
NgramWeights = dict[tuple[str, ...], float]


def cider_d(
    predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> dict[str, float]:
    """`CIDEr`, 0 to 10: cosine of tf-idf n-gram vectors, mean over images (1411.5726, CIDEr-D).

    An n-gram's document frequency is the number of images that have it in a reference, so the
    score belongs to its set of images, and of a single image it is 0. Weights are clipped at the
    reference's; lengths are compared in bigrams. Equal to pycocoevalcap 1.2's, whose `Cider` is
    this CIDEr-D.
    """
    frequency: Counter[tuple[str, ...]] = Counter()
    for own in references:
        frequency.update(
            {g for reference in own for n in NGRAM_ORDERS for g in ngrams(reference, n)}
        )
    log_images = math.log(len(references))

    def weigh(tokens: Tokens) -> list[NgramWeights]:
        counts = (Counter(ngrams(tokens, n)) for n in NGRAM_ORDERS)
        return [
            {g: c * (log_images - math.log(max(1, frequency[g]))) for g, c in count.items()}
            for count in counts
        ]

    def score(prediction: Tokens, own: Sequence[Tokens]) -> float:
        said = weigh(prediction)
        likeness = [
            _length_penalty(prediction, reference)
            * sum(map(_clipped_cosine, said, weigh(reference)))
            for reference in own
        ]
        return 10 * sum(likeness) / len(NGRAM_ORDERS) / len(own)

    scores = [score(p, own) for p, own in zip(predictions, references, strict=True)]
    return {"CIDEr": sum(scores) / len(scores)}


def _clipped_cosine(said: NgramWeights, wanted: NgramWeights) -> float:
    norms = math.hypot(*said.values()) * math.hypot(*wanted.values())
    if not norms:
        return 0.0
    return sum(min(w, wanted[g]) * wanted[g] for g, w in said.items() if g in wanted) / norms


def _length_penalty(said: Tokens, wanted: Tokens) -> float:
    difference = max(len(said) - 1, 0) - max(len(wanted) - 1, 0)
    return math.exp(-(difference**2) / (2 * SIGMA**2))
