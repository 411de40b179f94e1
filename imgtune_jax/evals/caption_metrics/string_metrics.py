"""Metrics on strings, which do not depend on a tokenization into words."""

from __future__ import annotations

from collections.abc import Sequence

from imgtune_jax.evals.caption_metrics.tokens import normalize_text


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return sacrebleu's `chrF`, 0 to 100: corpus-level F2 of character 1- to 6-grams (W15-3049).

    Each image counts with its best reference. Case and white space are ignored (case:lc and
    space:no in sacrebleu's signature).
    """
    from sacrebleu.metrics.chrf import CHRF  # imported here because the import is slow

    # sacrebleu expects the same number of references for every image, so repeat the last one.
    max_references = max(map(len, references))
    streams = [[row[min(i, len(row) - 1)] for row in references] for i in range(max_references)]
    return {"chrF": CHRF(lowercase=True).corpus_score(list(predictions), streams).score}


def exact_match(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return `exact_match`: the fraction of captions that, normalized, equal a reference."""
    hits = [
        normalize_text(p) in map(normalize_text, row)
        for p, row in zip(predictions, references, strict=True)
    ]
    return {"exact_match": sum(hits) / len(hits)}
