"""Classification by a captioner: an image's class is the one whose name it would rather write."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from imgtune_jax.evals.checks import check_finite, checked_labels
from imgtune_jax.evals.protocol import Predictor
from imgtune_jax.evals.zeroshot import Templates, ZeroShot, class_prompts, ranks_from_scores


@dataclass(frozen=True)
class ScoringClassifier(ZeroShot):
    """Zero-shot classification by log p(prompt | image), CapPa's scoring (2306.07915).

    Of several prompts of a class, the mean of their probabilities counts. `prefix` is what the
    model is told first, such as a language. With `normalize_length`, log p is divided by the number of
    tokens, so that classes with long names are not at a loss. Every image is scored with every
    prompt: the time is that of so many captions. Other fields as in ZeroShot.
    """

    templates: str | Templates = ("{}",)
    prefix: str = ""
    normalize_length: bool = False

    def __call__(self, encoders: Predictor) -> dict[str, float]:
        """acc1, acc5, mean_per_class_recall and the rest, by name."""
        prompts = [class_prompts(name, self.resolved_templates) for name in self.names]
        distinct = list(dict.fromkeys(prompt for own in prompts for prompt in own))
        scores, valid = encoders.score_texts(
            self.source, distinct, prefix=self.prefix, normalize_length=self.normalize_length
        )
        labels = checked_labels(self.source, valid, num_classes=len(prompts))
        check_finite(scores[valid], "log probabilities")
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        by_class = [mean_log_prob(scores[valid][:, [row_of[p] for p in own]]) for own in prompts]
        return self.metrics(*ranks_from_scores(np.stack(by_class, 1), labels), labels, valid)


def mean_log_prob(scores: Float[np.ndarray, "n p"]) -> Float[np.ndarray, " n"]:
    """log of the mean of exp(scores), over prompts."""
    return np.logaddexp.reduce(scores, axis=1) - np.log(scores.shape[1])
