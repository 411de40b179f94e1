"""Captioning: what a model writes of images, beside what people wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool

from imgtune_jax import decoding
from imgtune_jax.data import Source, Subset, evenly_spaced, read_metadata
from imgtune_jax.evals import caption_metrics
from imgtune_jax.evals.protocol import GeneratedCaption, Predictor


@dataclass(frozen=True)
class Captioning:
    """Captions of a source's images against those of `caption_set`, all of which are references.

    `prefix` is what the model is told first, such as a language (config.data.prefixes).
    `decoding` is what `decoding.build` takes; {} is greedy. `metrics` and `tokenization` are names
    of `caption_metrics`' tables: compare scores that count words under one tokenization and over
    one set of images only, and note that n-grams which captions are too short for count as misses.
    `limit` judges so many images, evenly spread over the source, while the model trains;
    `imgtune eval` judges all. Images without a reference are left out; those that cannot be read
    leave too, as `num_broken`.
    """

    task: ClassVar[str] = "captioning"

    source: Source
    caption_set: str = "caption"
    prefix: str = ""
    decoding: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ("bleu", "rouge_l", "cider", "chrf", "exact_match", "perplexity")
    tokenization: str = "simple"
    limit: int | None = None
    language: str = "en"

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown name or setting, before hours of training, not after."""
        caption_metrics.check_metrics(self._text_metrics, self.tokenization)
        decoding.build_generation_config(self.decoding, stop_ids=(0,), pad_id=0)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit = {self.limit}; wanted None for all images, or 1 or more")

    def __call__(self, encoders: Predictor) -> dict[str, float]:
        """`Bleu_1` to `Bleu_4`, `ROUGE_L`, `CIDEr` and the rest, by pycocoevalcap's names.

        `perplexity` is that of each image's first reference.
        """
        chosen = self.selected_images()
        written, valid = self.generate_captions(encoders, chosen)
        rows = np.flatnonzero(valid).tolist()
        if not rows:
            raise ValueError(f"none of the {len(valid)} images could be read")
        references = [self.references(chosen, i) for i in range(len(chosen))]
        metrics = caption_metrics.compute_metrics(
            [written[i][0].text for i in rows],
            [references[i] for i in rows],
            metrics=self._text_metrics,
            tokenization=self.tokenization,
        )
        if "perplexity" in self.metrics:
            metrics["perplexity"] = self._perplexity(encoders, chosen, [r[0] for r in references])
        return metrics | {"num_images": float(len(rows)), "num_broken": float((~valid).sum())}

    def selected_images(self, *, whole: bool = False) -> Subset:
        """The images to judge, at most `limit` unless `whole`.

        Raises ValueError when none has a reference.
        """
        places = range(len(self.source))
        captioned = [i for i in places if self.references(self.source, i)]
        if not captioned:
            raise ValueError(
                f"no record of {len(self.source)} has a caption in the set {self.caption_set!r}; "
                f"the first has {sorted(read_metadata(self.source, 0).captions)}"
            )
        limit = None if whole else self.limit
        return Subset(
            self.source, tuple(captioned[i] for i in evenly_spaced(len(captioned), limit))
        )

    def references(self, source: Source, index: int) -> tuple[str, ...]:
        """What people wrote of an image."""
        return tuple(read_metadata(source, index).captions.get(self.caption_set, ()))

    def generate_captions(
        self, encoders: Predictor, source: Source
    ) -> tuple[list[list[GeneratedCaption]], Bool[np.ndarray, " n"]]:
        """What the model writes as this evaluator asks it to; see `Encoders.captions`."""
        return encoders.generate_captions(source, prefix=self.prefix, decoding=self.decoding)

    def _perplexity(self, encoders: Predictor, chosen: Subset, texts: list[str]) -> float:
        found = encoders.caption_scores(chosen, texts, self.prefix)
        assert found is not None, "a model that writes also scores"
        counted = found.target_mask[:, 1:] & found.valid[:, None]
        return float(np.exp(-found.scores.log_prob[counted].mean(dtype=np.float64)))

    @property
    def _text_metrics(self) -> tuple[str, ...]:
        return tuple(name for name in self.metrics if name != "perplexity")
