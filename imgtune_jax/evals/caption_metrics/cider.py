"""CIDEr-D for captions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from imgtune_jax.evals.caption_metrics.tokens import Tokens, ngrams

NGRAM_ORDERS = (1, 2, 3, 4)
SIGMA = 6.0  # standard deviation, in tokens, of the Gaussian length penalty
NgramWeights = dict[tuple[str, ...], float]  # tf-idf weight of each n-gram of one order


def cider_d(
    predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> dict[str, float]:
    """Return `CIDEr`, 0 to 10: cosine of tf-idf n-gram vectors, mean over images (1411.5726).

    This is the paper's CIDEr-D. The document frequency of an n-gram is the number of images that
    have it in a reference. The score therefore depends on the set of images; for a single image, it
    is 0. The candidate's weights are clipped to the reference's weights, and the length penalty
    compares the numbers of bigrams. Equal to pycocoevalcap 1.2, whose `Cider` is CIDEr-D.
    """
    frequency: Counter[tuple[str, ...]] = Counter()
    for image_references in references:
        frequency.update(
            {
                ngram
                for reference in image_references
                for n in NGRAM_ORDERS
                for ngram in ngrams(reference, n)
            }
        )
    log_images = math.log(len(references))

    def tf_idf(tokens: Tokens) -> list[NgramWeights]:
        counts = (Counter(ngrams(tokens, n)) for n in NGRAM_ORDERS)
        return [
            {
                ngram: count * (log_images - math.log(max(1, frequency[ngram])))
                for ngram, count in order_counts.items()
            }
            for order_counts in counts
        ]

    def score(candidate: Tokens, image_references: Sequence[Tokens]) -> float:
        weights = tf_idf(candidate)
        similarities = [
            _length_penalty(candidate, reference)
            * sum(map(_clipped_cosine, weights, tf_idf(reference)))
            for reference in image_references
        ]
        return 10 * sum(similarities) / len(NGRAM_ORDERS) / len(image_references)

    scores = [score(c, rs) for c, rs in zip(predictions, references, strict=True)]
    return {"CIDEr": sum(scores) / len(scores)}


def _clipped_cosine(candidate: NgramWeights, reference: NgramWeights) -> float:
    # The norms are those of the unclipped weights.
    norms = math.hypot(*candidate.values()) * math.hypot(*reference.values())
    if not norms:
        return 0.0
    common = ((x, reference[ngram]) for ngram, x in candidate.items() if ngram in reference)
    return sum(min(x, y) * y for x, y in common) / norms


def _length_penalty(candidate: Tokens, reference: Tokens) -> float:
    # Tokens minus 1: the number of bigrams, which pycocoevalcap compares.
    difference = max(len(candidate) - 1, 0) - max(len(reference) - 1, 0)
    return math.exp(-(difference**2) / (2 * SIGMA**2))
