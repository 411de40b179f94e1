"""Caption metrics: pure functions of predictions and references.

To add a metric, add a function and a line in `TOKEN_METRICS` or `STRING_METRICS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from imgtune_jax.errors import UserError
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
    """Raise UserError for an unknown name, and for one that needs Java if Java is missing."""
    known = [*TOKEN_METRICS, *STRING_METRICS]
    if unknown := [name for name in metrics if name not in known]:
        raise UserError(f"unknown caption metrics {unknown}; known: {', '.join(known)}")
    if tokenization not in TOKENIZATIONS:
        raise UserError(f"tokenization = {tokenization!r}; known: {', '.join(TOKENIZATIONS)}")
    if tokenization == "ptb" or "meteor" in metrics:
        java.require_java()


def compute_metrics(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    metrics: Collection[str],
    tokenization: str = "simple",
) -> Scores:
    """Compute `metrics` of one predicted caption per image, given the references of each image.

    Only the metrics in `TOKEN_METRICS` use `tokenization`. Raises UserError for an unknown name,
    for an empty list, and for an image without a reference.
    """
    check_metrics(metrics, tokenization)
    num_empty = sum(not texts for texts in references)
    if not predictions or len(predictions) != len(references) or num_empty:
        raise UserError(
            f"got {len(predictions)} captions and {len(references)} lists of references, of which "
            f"{num_empty} are empty; expected one caption and at least one reference per image"
        )
    scores: Scores = {}
    if any(name in TOKEN_METRICS for name in metrics):
        candidates, tokenized_references = _tokenize(predictions, references, tokenization)
        for name in metrics:
            if name in TOKEN_METRICS:
                scores |= TOKEN_METRICS[name](candidates, tokenized_references)
    for name in metrics:
        if name in STRING_METRICS:
            scores |= STRING_METRICS[name](predictions, references)
    return scores


def metric_names(metrics: Collection[str]) -> tuple[str, ...]:
    """Return the names of the scores that `compute_metrics` returns."""
    in_python = [name for name in metrics if name != "meteor"]  # Java takes seconds to start
    caption = "a dog runs on grass"  # any text has these scores
    scores = compute_metrics([caption], [[caption]], metrics=in_python)
    return (*scores, "METEOR") if "meteor" in metrics else tuple(scores)


def _tokenize(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenization: str
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Tokenize all texts in one call, since PTB's Java process is slow to start."""
    texts = [*predictions, *(text for row in references for text in row)]
    tokens = iter(TOKENIZATIONS[tokenization](texts))
    candidates = [next(tokens) for _ in predictions]
    return candidates, [[next(tokens) for _ in row] for row in references]
