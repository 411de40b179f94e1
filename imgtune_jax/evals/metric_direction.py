"""Whether higher or lower values of a metric are better, by its name."""

from __future__ import annotations

# Metrics whose names contain one of these strings are fractions of 1, and higher is better.
FRACTIONS = ("recall", "R@", "acc", "f1", "precision", "Bleu", "ROUGE", "METEOR", "CIDEr", "exact")
SETTINGS = ("l2", "best_lambda", "converged")


def is_fraction(metric: str) -> bool:
    """Whether a metric is a fraction of 1, such as a recall or an accuracy."""
    return any(part in metric for part in FRACTIONS)


def metric_sign(metric: str) -> int:
    """Return 1 if higher is better, -1 if lower is better, 0 for counts and settings.

    Lower is better for ranks and for whatever is no known score, such as losses and perplexities.
    """
    if metric.startswith("num_") or metric in SETTINGS:
        return 0
    is_score = is_fraction(metric) or metric == "chrF"
    return 1 if is_score and "rank" not in metric else -1
