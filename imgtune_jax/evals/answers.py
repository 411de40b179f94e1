"""Classification by a captioner: an image's class is the one whose name it would rather write."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from imgtune_jax.evals.checks import check_finite, checked_labels
from imgtune_jax.evals.protocol import Encoders
from imgtune_jax.evals.zeroshot import Templates, ZeroShot, prompts_of, ranks_in


@dataclass(frozen=True)
class Answers(ZeroShot):
    """Zero-shot classification by log p(prompt | image), CapPa's scoring (2306.07915).

    Of several prompts of a class, the mean of their probabilities counts. `prefix` is what the
    model is told first, such as a language. With `normalise`, log p is divided by the number of
    tokens, so that classes with long names are not at a loss. Every image is scored with every
    prompt: the time is that of so many captions. Other fields as in ZeroShot.
    """

    templates: str | Templates = ("{}",)
    prefix: str = ""
    normalise: bool = False

    def __call__(self, encoders: Encoders) -> dict[str, float]:
        """acc1, acc5, mean_per_class_recall and the rest, by name."""
        prompts = [prompts_of(name, self.named_templates) for name in self.names]
        distinct = list(dict.fromkeys(prompt for own in prompts for prompt in own))
        scores, valid = encoders.answer_scores(
            self.source, distinct, prefix=self.prefix, normalise=self.normalise
        )
        labels = checked_labels(self.source, valid, num_classes=len(prompts))
        check_finite(scores[valid], "log probabilities")
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        by_class = [mean_log_prob(scores[valid][:, [row_of[p] for p in own]]) for own in prompts]
        return self.metrics(*ranks_in(np.stack(by_class, 1), labels), labels, valid)


def mean_log_prob(scores: Float[np.ndarray, "n p"]) -> Float[np.ndarray, " n"]:
    """log of the mean of exp(scores), over prompts."""
    return np.logaddexp.reduce(scores, axis=1) - np.log(scores.shape[1])
