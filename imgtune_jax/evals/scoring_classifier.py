"""Classification with a captioner: predict the class whose prompts are the likeliest captions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from imgtune_jax.data import Tokenizer
from imgtune_jax.evals.checks import check_finite, check_has, checked_labels
from imgtune_jax.evals.protocol import Predictor
from imgtune_jax.evals.zeroshot import Templates, ZeroShot, class_prompts, ranks_from_scores
from imgtune_jax.models import ImageTextModel


@dataclass(frozen=True)
class ScoringClassifier(ZeroShot):
    """Zero-shot classification by log p(prompt | image), as in CapPa (2306.07915).

    The score of a class with several prompts is their mean probability. `prefix` is the start of
    every caption, such as a language token. With `normalize_length`, log p is divided by the
    number of tokens, so that classes with long names are not penalized. The model scores (number
    of images) x (number of prompts) captions. Other fields are as in `ZeroShot`.
    """

    templates: str | Templates = ("{}",)
    prefix: str = ""
    normalize_length: bool = False

    def __call__(self, predictor: Predictor) -> dict[str, float]:
        """Return `acc1`, `acc5`, `mean_per_class_recall`, …, `num_images` and `num_broken`."""
        prompts = [class_prompts(name, self.resolved_templates) for name in self.names]
        distinct = list(dict.fromkeys(prompt for row in prompts for prompt in row))
        scores, valid = predictor.score_texts(
            self.source, distinct, prefix=self.prefix, normalize_length=self.normalize_length
        )
        labels = checked_labels(self.source, valid, num_classes=len(prompts))
        check_finite(scores[valid], "log probabilities")
        column_of = {prompt: i for i, prompt in enumerate(distinct)}
        class_scores = np.stack(
            [log_mean_prob(scores[valid][:, [column_of[p] for p in row]]) for row in prompts], 1
        )
        return self.metrics(*ranks_from_scores(class_scores, labels), labels, valid)

    def check(self, model: ImageTextModel, tokenizer: Tokenizer) -> None:
        """Raise UserError if the settings do not fit the source, the model or the tokenizer."""
        check_has(model, "decoder")
        tokenizer.prompt_ids(self.prefix)
        self.check_classes()


def log_mean_prob(scores: Float[np.ndarray, "n p"]) -> Float[np.ndarray, " n"]:
    """Return the logarithm of the mean of exp(scores) over prompts."""
    return np.logaddexp.reduce(scores, axis=1) - np.log(scores.shape[1])
