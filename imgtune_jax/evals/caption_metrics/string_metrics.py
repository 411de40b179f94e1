"""Scores that read captions as they are written, so that no tokenization enters."""

from __future__ import annotations

from collections.abc import Sequence

from imgtune_jax.evals.caption_metrics.tokens import normalised


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`chrF`, 0 to 100: F2 of character 1- to 6-grams of the corpus, by sacrebleu (W15-3049).

    Of an image's references the best one counts. Neither case nor white space matters
    (sacrebleu's case:lc, space:no).
    """
    from sacrebleu.metrics.chrf import CHRF  # only who asks for it waits for its import

    most = max(map(len, references))
    streams = [[own[min(i, len(own) - 1)] for own in references] for i in range(most)]
    return {"chrF": CHRF(lowercase=True).corpus_score(list(predictions), streams).score}


def exact_match(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """`exact_match`: the share of captions that equal a reference, after `normalised`."""
    hits = [
        normalised(p) in map(normalised, own)
        for p, own in zip(predictions, references, strict=True)
    ]
    return {"exact_match": sum(hits) / len(hits)}
