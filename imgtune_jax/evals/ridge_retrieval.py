"""The ridge baseline as an evaluator: what closed-form regression gets from the same features."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from imgtune_jax.data import Source
from imgtune_jax.evals.protocol import Encoders
from imgtune_jax.evals.retrieval import Retrieval
from imgtune_jax.evals.ridge import ridge_baseline


@dataclass(frozen=True)
class RidgeRetrieval:
    """Regress text embeddings on image features over `train_source`, retrieve over `source`.

    Features are standardised by their training statistics, as a standardising head does; texts are
    the first caption of `caption_set`, embedded by the text side as it is when this runs. The best
    of `lambdas` is chosen on `source` itself, which flatters the baseline.
    """

    task: ClassVar[str] = "zeroshot_retrieval"

    train_source: Source
    source: Source
    caption_set: str = "caption"
    lambdas: tuple[float, ...] = (10.0, 100.0, 1e3, 3e3, 1e4, 3e4, 1e5)
    language: str = "en"

    def __call__(self, encoders: Encoders) -> dict[str, float]:
        x, x_valid = encoders.features(self.train_source)
        captions, image_of_text, _ = dataclasses.replace(
            Retrieval(self.train_source, caption_set=self.caption_set), max_captions=1
        ).pairs(x_valid)
        test, test_valid = encoders.features(self.source)
        test_captions, test_image_of_text, _ = Retrieval(
            self.source, caption_set=self.caption_set
        ).pairs(test_valid)
        x = x[x_valid].astype(np.float64)
        mean, std = x.mean(0), x.std(0)
        std[std < 1e-6] = 1.0
        found = ridge_baseline(
            ((x - mean) / std)[image_of_text],
            encoders.texts(captions),
            (test[test_valid] - mean) / std,
            encoders.texts(test_captions),
            self.lambdas,
            image_of_text=test_image_of_text,
        )
        return found.metrics | {"best_lambda": found.best_lambda}
