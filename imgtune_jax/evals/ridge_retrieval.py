"""The ridge baseline as an evaluator: what closed-form regression gets from the same features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jax.sharding import Mesh

from imgtune_jax.data import Source
from imgtune_jax.evals.protocol import Predictor
from imgtune_jax.evals.retrieval import Retrieval
from imgtune_jax.evals.ridge import Ridge, ridge_baseline


@dataclass(frozen=True)
class RidgeRetrieval:
    """Regress the text tower's vectors on the image tower's over `train_source`, then retrieve.

    No head and no training: pooled features and unit-norm text vectors as the towers give them when
    this runs. Texts are the first caption of `caption_set`. `standardize` divides each feature by
    its standard deviation over the training images. The best of `lambdas` is chosen on `source`
    itself, which flatters the baseline.
    """

    task: ClassVar[str] = "zeroshot_retrieval"

    train_source: Source
    source: Source
    caption_set: str = "caption"
    standardize: bool = False
    lambdas: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)
    language: str = "en"
    mesh: Mesh | None = None

    def __call__(self, encoders: Predictor) -> dict[str, float]:
        key = ("ridge", self.train_source.fingerprint, self.caption_set, self.standardize)
        std, ridge = encoders.memoize(key, lambda: self._fit(encoders))
        x, y, of_text = self._pairs(encoders, self.source, max_captions=None)
        found = ridge_baseline(
            ridge, x / std, y, self.lambdas, image_of_text=of_text, mesh=self.mesh
        )
        return found.metrics | {"best_lambda": found.best_lambda}

    def _fit(self, encoders: Predictor) -> tuple[np.ndarray, Ridge]:
        """What the features are divided by, and the regression; one serves every test."""
        x, y, of_text = self._pairs(encoders, self.train_source, max_captions=1)
        std = np.ones(x.shape[1])
        if self.standardize:
            found = x.std(0)
            std = np.where(found < 1e-6, 1.0, found)
        return std, Ridge.fit((x / std)[of_text], y, intercept=True)

    def _pairs(
        self, encoders: Predictor, source: Source, max_captions: int | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(image features, unit-norm text vectors, the image of each text) of what can be read."""
        features, valid = encoders.image_features(source)
        retrieval = Retrieval(source, caption_set=self.caption_set, max_captions=max_captions)
        captions, image_of_text, _ = retrieval.captions_and_groups(valid)
        texts = encoders.text_features(captions).astype(np.float64)
        texts /= np.linalg.norm(texts, axis=1, keepdims=True)
        return features[valid].astype(np.float64), texts, image_of_text
