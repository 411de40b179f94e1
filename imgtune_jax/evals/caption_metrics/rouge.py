"""ROUGE-L of captions."""

from __future__ import annotations

from collections.abc import Sequence

from imgtune_jax.evals.caption_metrics.tokens import Tokens

BETA = 1.2  # recall counts that much more than precision


def rouge_l(
    predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> dict[str, float]:
    """`ROUGE_L` in [0, 1]: F of the longest common subsequence, mean over images (Lin, W04-1013).

    Of an image's references, the best precision and the best recall count, be they of different
    ones. A caption without a token counts as one empty token, which another empty one matches.
    Equal to pycocoevalcap 1.2's.
    """
    scores = [_f_score(p, own) for p, own in zip(predictions, references, strict=True)]
    return {"ROUGE_L": sum(scores) / len(scores)}


def _f_score(prediction: Tokens, references: Sequence[Tokens]) -> float:
    said = list(prediction) or [""]
    wanted = [list(reference) or [""] for reference in references]
    common = [_lcs_length(said, reference) for reference in wanted]
    precision = max(common) / len(said)
    recall = max(c / len(r) for c, r in zip(common, wanted, strict=True))
    if not common or not precision:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _lcs_length(a: Tokens, b: Tokens) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        corner = 0
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], corner + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
