"""ROUGE-L for captions."""

from __future__ import annotations

from collections.abc import Sequence

from imgtune_jax.evals.caption_metrics.tokens import Tokens

BETA = 1.2  # weight of recall relative to precision in the F score


def rouge_l(
    predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> dict[str, float]:
    """Return `ROUGE_L` in [0, 1]: F score of the longest common subsequence (Lin, W04-1013).

    The score is the mean over images. An image's F score combines its best precision and its best
    recall over all references, even if they come from different references. A caption without
    tokens counts as one empty token, which matches another empty caption. Equal to pycocoevalcap
    1.2.
    """
    scores = [_f_score(p, rs) for p, rs in zip(predictions, references, strict=True)]
    return {"ROUGE_L": sum(scores) / len(scores)}


def _f_score(prediction: Tokens, references: Sequence[Tokens]) -> float:
    candidate = list(prediction) or [""]
    nonempty_references = [list(reference) or [""] for reference in references]
    common = [_lcs_length(candidate, reference) for reference in nonempty_references]
    precision = max(common) / len(candidate)
    recall = max(c / len(r) for c, r in zip(common, nonempty_references, strict=True))
    if not common or not precision:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _lcs_length(a: Tokens, b: Tokens) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
