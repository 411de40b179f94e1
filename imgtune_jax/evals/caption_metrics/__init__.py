"""How good captions are: each score a pure function of predictions and references.

A new score is a function and a line in `ON_TOKENS` or in `ON_TEXT`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from imgtune_jax.evals.caption_metrics import java
from imgtune_jax.evals.caption_metrics.bleu import bleu
from imgtune_jax.evals.caption_metrics.cider import cider_d
from imgtune_jax.evals.caption_metrics.rouge import rouge_l
from imgtune_jax.evals.caption_metrics.string_metrics import chrf, exact_match
from imgtune_jax.evals.caption_metrics.tokens import Tokens, simple_tokens

TOKENIZATIONS: dict[str, Callable[[Sequence[str]], list[list[str]]]] = {
    "simple": simple_tokens,
    "ptb": java.ptb_tokens,
}
Scores = dict[str, float]
TOKEN_METRICS: dict[str, Callable[[Sequence[Tokens], Sequence[Sequence[Tokens]]], Scores]] = {
    "bleu": bleu,
    "rouge_l": rouge_l,
    "cider": cider_d,
    "meteor": java.meteor,
}
STRING_METRICS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], Scores]] = {
    "chrf": chrf,
    "exact_match": exact_match,
}


def check_metrics(metrics: Collection[str], tokenization: str) -> None:
    """Raise ValueError for a name that is in no table, and for one that needs what is missing."""
    known = [*TOKEN_METRICS, *STRING_METRICS]
    if unknown := [name for name in metrics if name not in known]:
        raise ValueError(f"no caption metric {unknown}; known: {', '.join(known)}")
    if tokenization not in TOKENIZATIONS:
        raise ValueError(f"tokenization = {tokenization!r}; known: {', '.join(TOKENIZATIONS)}")
    if tokenization == "ptb" or "meteor" in metrics:
        java.require_java()


def compute_metrics(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    metrics: Collection[str],
    tokenization: str = "simple",
) -> Scores:
    """All `metrics` of one prediction an image against its references, by name.

    `tokenization` is for those in `ON_TOKENS`, and their values depend on it.
    Raises ValueError for an unknown name, for no image, or for an image without a reference.
    """
    check_metrics(metrics, tokenization)
    bare = [i for i, own in enumerate(references) if not own]
    if not predictions or len(predictions) != len(references) or bare:
        raise ValueError(
            f"{len(predictions)} captions and {len(references)} lists of references, of which "
            f"{len(bare)} are empty; wanted one caption and at least one reference an image"
        )
    scores: Scores = {}
    if any(name in TOKEN_METRICS for name in metrics):
        said, wanted = _tokenized(predictions, references, tokenization)
        for name in metrics:
            if name in TOKEN_METRICS:
                scores |= TOKEN_METRICS[name](said, wanted)
    for name in metrics:
        if name in STRING_METRICS:
            scores |= STRING_METRICS[name](predictions, references)
    return scores


def _tokenized(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenization: str
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """One call for all texts: a tokenizer may be a process that takes long to start."""
    rows = iter(
        TOKENIZATIONS[tokenization]([*predictions, *(r for own in references for r in own)])
    )
    said = [next(rows) for _ in predictions]
    return said, [[next(rows) for _ in own] for own in references]
