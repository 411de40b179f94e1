"""The ridge baseline as an evaluator: closed-form regression on the features of the same towers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jax.sharding import Mesh

from imgtune_jax.data import Source, Tokenizer
from imgtune_jax.evals.checks import check_captions, check_has, check_images
from imgtune_jax.evals.normalize import normalize_rows
from imgtune_jax.evals.protocol import Predictor
from imgtune_jax.evals.retrieval import Retrieval, retrieval_metric_names
from imgtune_jax.evals.ridge import Ridge, ridge_baseline
from imgtune_jax.models import ImageTextModel


@dataclass(frozen=True)
class RidgeRetrieval:
    """Fit a ridge regression from image to text features on `train_source`; retrieve in `source`.

    Features are the towers' pooled outputs with the current parameters, before the heads. Text
    features are scaled to unit norm. The regression is fitted to the first caption of each training
    image in `caption_set`; retrieval uses all captions of that set. `standardize` divides each
    image feature by its standard deviation over the training images. The best of `lambdas` is
    selected on `source` itself, which favors the baseline.
    """

    task: ClassVar[str] = "zeroshot_retrieval"

    train_source: Source
    source: Source
    caption_set: str = "caption"
    standardize: bool = False
    lambdas: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)
    language: str = "en"
    mesh: Mesh | None = None

    def __call__(self, predictor: Predictor) -> dict[str, float]:
        """Return retrieval metrics and `best_lambda`."""
        key = ("ridge", self.train_source.fingerprint, self.caption_set, self.standardize)
        std, ridge = predictor.memoize(key, lambda: self._fit(predictor))
        x, y, image_of_text = self._features(predictor, self.source, max_captions=None)
        baseline = ridge_baseline(
            ridge, x / std, y, self.lambdas, image_of_text=image_of_text, mesh=self.mesh
        )
        return baseline.metrics | {"best_lambda": baseline.best_lambda}

    def metric_names(self) -> tuple[str, ...]:
        """Return the names of all metrics that a call may return."""
        names = retrieval_metric_names((1, 5, 10), num_images=len(self.source))
        return (*names, "best_lambda")

    def check(self, model: ImageTextModel, tokenizer: Tokenizer) -> None:
        """Raise UserError if the settings do not fit the sources or the model."""
        del tokenizer
        check_has(model, "text")
        for source in (self.train_source, self.source):
            check_captions(source, self.caption_set)
            check_images(source)

    def _fit(self, predictor: Predictor) -> tuple[np.ndarray, Ridge]:
        """Return the divisors of the image features, and the regression."""
        x, y, image_of_text = self._features(predictor, self.train_source, max_captions=1)
        std = np.ones(x.shape[1])
        if self.standardize:
            std = x.std(0)
            std = np.where(std < 1e-6, 1.0, std)
        return std, Ridge.fit((x / std)[image_of_text], y, intercept=True)

    def _features(
        self, predictor: Predictor, source: Source, max_captions: int | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the readable images' features, unit-norm text features, image_of_text."""
        features, valid = predictor.image_features(source)
        retrieval = Retrieval(source, caption_set=self.caption_set, max_captions=max_captions)
        captions, image_of_text, _ = retrieval.captions_and_groups(valid)
        text_emb = normalize_rows(predictor.text_features(captions).astype(np.float64))
        return features[valid].astype(np.float64), text_emb, image_of_text
