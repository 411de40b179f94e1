"""Captioning: compare generated captions with reference captions."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool

from imgtune_jax import decoding
from imgtune_jax.data import Source, Subset, Tokenizer, evenly_spaced, read_metadata
from imgtune_jax.errors import UserError
from imgtune_jax.evals import caption_metrics
from imgtune_jax.evals.caption_metrics.tokens import normalize_text
from imgtune_jax.evals.captioner import Captioner
from imgtune_jax.evals.checks import check_captions, check_images, no_captions_error
from imgtune_jax.evals.protocol import GeneratedCaption, Predictor
from imgtune_jax.models import ImageTextModel

log = logging.getLogger("imgtune_jax.evals")


@dataclass(frozen=True)
class Captioning:
    """Caption a source's images; the references of an image are its captions in `caption_set`.

    `prefix` is the start of every caption, such as a language token (config.data.prefixes).
    `decoding` has the settings that `decoding.build_generation_config` takes; {} is greedy
    decoding. `metrics` and `tokenization` are names in the tables of `caption_metrics`. Compare
    metrics that count words only for the same tokenization and images. A caption of fewer than n
    tokens has no n-gram matches, which lowers BLEU-n and CIDEr. Training evaluates `limit` images,
    evenly spaced in the source; `imgtune eval` evaluates all. Images without a reference are
    excluded. Unreadable images are excluded too, and counted by `num_broken`.
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
        """Raise UserError for an unknown name or setting, before training starts."""
        caption_metrics.check_metrics(self._text_metrics, self.tokenization)
        decoding.build_generation_config(self.decoding, stop_ids=(0,), pad_id=0)
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit = {self.limit}; expected None (all images) or at least 1")

    def __call__(self, predictor: Predictor) -> dict[str, float]:
        """Return the metrics under pycocoevalcap's names: `Bleu_1` to `Bleu_4`, `ROUGE_L`, `CIDEr`.

        `perplexity` is the model's perplexity on the first reference of each image. `same_caption`
        is the fraction of images that have the most frequent caption, and `same_reference` the
        fraction that have the most frequent reference.
        """
        images = self.selected_images()
        captions, valid = self.generate_captions(predictor, images)
        readable = np.flatnonzero(valid).tolist()
        if not readable:
            raise UserError(
                f"none of the {len(valid)} images could be read; check the source's files"
            )
        references = [self.references(images, i) for i in range(len(images))]
        predictions = [captions[i][0].text for i in readable]
        metrics = caption_metrics.compute_metrics(
            predictions,
            [references[i] for i in readable],
            metrics=self._text_metrics,
            tokenization=self.tokenization,
        )
        if "perplexity" in self.metrics:
            first_references = [texts[0] for texts in references]
            metrics["perplexity"] = self._perplexity(predictor, images, first_references)
        metrics |= _repetition([(p,) for p in predictions], [references[i] for i in readable])
        return metrics | {"num_images": float(len(readable)), "num_broken": float((~valid).sum())}

    def metric_names(self) -> tuple[str, ...]:
        """Return the names of all metrics that a call may return."""
        perplexity = ("perplexity",) if "perplexity" in self.metrics else ()
        text_metrics = caption_metrics.metric_names(self._text_metrics)
        repetition = ("same_caption", "same_reference")
        return (*text_metrics, *perplexity, *repetition, "num_images", "num_broken")

    def check(self, model: ImageTextModel, tokenizer: Tokenizer) -> None:
        """Raise UserError if the settings do not fit the source, the model or the tokenizer."""
        prompt_length = len(tokenizer.prompt_ids(self.prefix))
        Captioner.build(model, tokenizer, prompt_length=prompt_length, settings=self.decoding)
        check_captions(self.source, self.caption_set)
        check_images(self.source)

    def selected_images(self, *, ignore_limit: bool = False) -> Subset:
        """Return the images that have a reference, at most `limit` of them, evenly spaced.

        Raises UserError if no image has a reference.
        """
        captioned = [i for i in range(len(self.source)) if self.references(self.source, i)]
        if not captioned:
            records = f"{len(self.source)} records"
            raise no_captions_error(self.source, self.caption_set, records=records)
        limit = None if ignore_limit else self.limit
        return Subset(
            self.source, tuple(captioned[i] for i in evenly_spaced(len(captioned), limit))
        )

    def references(self, source: Source, index: int) -> tuple[str, ...]:
        """Return the reference captions of image `index`."""
        return tuple(read_metadata(source, index).captions.get(self.caption_set, ()))

    def generate_captions(
        self, predictor: Predictor, source: Source
    ) -> tuple[list[list[GeneratedCaption]], Bool[np.ndarray, " n"]]:
        """Call `Predictor.generate_captions` with this evaluator's prefix and decoding settings."""
        return predictor.generate_captions(source, prefix=self.prefix, decoding=self.decoding)

    def _perplexity(self, predictor: Predictor, images: Subset, captions: list[str]) -> float:
        caption_scores = predictor.caption_scores(images, captions, self.prefix)
        assert caption_scores is not None, "a model that generates captions can score them"
        is_scored = caption_scores.target_mask[:, 1:] & caption_scores.valid[:, None]
        return float(np.exp(-caption_scores.scores.log_prob[is_scored].mean(dtype=np.float64)))

    @property
    def _text_metrics(self) -> tuple[str, ...]:
        return tuple(name for name in self.metrics if name != "perplexity")


def is_repetitive(metrics: Mapping[str, float | None]) -> bool:
    """Return whether one caption is much more frequent than any reference.

    Let r be the fraction of images that have the most frequent reference. The limit is (1 + r) / 2
    of the images: half of them if every image has its own references.
    """
    caption, reference = metrics.get("same_caption"), metrics.get("same_reference")
    return caption is not None and reference is not None and caption > (1 + reference) / 2


def _repetition(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return `same_caption` and `same_reference`; log a warning if captions are repetitive."""
    text, same_caption = _most_frequent(predictions)
    metrics = {"same_caption": same_caption, "same_reference": _most_frequent(references)[1]}
    if is_repetitive(metrics):
        log.warning(
            "%.0f %% of %d images have the same caption: %.80r",
            100 * same_caption,
            len(predictions),
            text,
        )
    return metrics


def _most_frequent(texts: Sequence[Sequence[str]]) -> tuple[str, float]:
    """Return the text that most images have, up to case and punctuation, and their fraction."""
    counts = Counter(text for row in texts for text in set(map(normalize_text, row)))
    text, count = counts.most_common(1)[0]
    return text, count / len(texts)
