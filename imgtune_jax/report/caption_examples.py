"""Caption examples: generated captions of randomly sampled images next to their references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from imgtune_jax.data import Subset
from imgtune_jax.evals.caption_metrics.string_metrics import exact_match
from imgtune_jax.evals.captioning import Captioning
from imgtune_jax.evals.protocol import Predictor
from imgtune_jax.report.retrieval_examples import EmbeddedImage, data_uri

NUM_IMAGES = 12  # examples per data set


@dataclass(frozen=True)
class CaptionLine:
    """A generated caption of an image in one language, and the image's references."""

    language: str
    prediction: str
    references: tuple[str, ...]
    hit: bool  # the caption equals a reference, up to case and punctuation


@dataclass(frozen=True)
class CaptionExample:
    """One image and its captions, one line per language."""

    image: EmbeddedImage
    lines: list[CaptionLine]


@dataclass(frozen=True)
class CaptionExamples:
    """Captions of images sampled from the `num_images` of a data set that have references."""

    dataset: str
    num_images: int
    examples: list[CaptionExample]


def sample_caption_examples(
    evaluators: Mapping[str, Captioning],
    predictor: Predictor,
    *,
    thumbnail: Callable[[object], bytes],
    seed: int = 0,
) -> list[CaptionExamples]:
    """Return caption examples for every source that `evaluators` use.

    Evaluators of one source, such as one per language, share the same example images. These are
    sampled with `seed` from the images that have references for all of the source's evaluators.
    """
    by_source: dict[str, dict[str, Captioning]] = {}
    for name, evaluator in evaluators.items():
        by_source.setdefault(evaluator.source.fingerprint, {})[name] = evaluator
    return [_sample_from_source(group, predictor, thumbnail, seed) for group in by_source.values()]


def _sample_from_source(
    evaluators: Mapping[str, Captioning],
    predictor: Predictor,
    thumbnail: Callable[[object], bytes],
    seed: int,
) -> CaptionExamples:
    source = next(iter(evaluators.values())).source
    captioned_indices = set.intersection(
        *(set(_captioned_indices(evaluator)) for evaluator in evaluators.values())
    )
    indices = np.random.default_rng(seed).permutation(sorted(captioned_indices))[:NUM_IMAGES]
    images = Subset(source, tuple(indices.tolist()))
    lines: list[list[CaptionLine]] = [[] for _ in indices]
    valid = np.ones(len(indices), bool)
    for evaluator in evaluators.values():
        captions, valid = evaluator.generate_captions(predictor, images)
        for i in np.flatnonzero(valid).tolist():
            lines[i].append(_caption_line(evaluator, captions[i][0].text, images, i))
    examples = [
        CaptionExample(
            EmbeddedImage(data_uri(thumbnail(images[i].image)), _alt_text(lines[i])), lines[i]
        )
        for i in np.flatnonzero(valid).tolist()
        if lines[i]
    ]
    return CaptionExamples(_common_name(list(evaluators)), len(captioned_indices), examples)


def _captioned_indices(evaluator: Captioning) -> Sequence[int]:
    return evaluator.selected_images(ignore_limit=True).indices


def _caption_line(evaluator: Captioning, caption: str, images: Subset, index: int) -> CaptionLine:
    references = evaluator.references(images, index)
    hit = exact_match([caption], [references])["exact_match"] == 1
    return CaptionLine(evaluator.language, caption, references, hit)


def _alt_text(lines: Sequence[CaptionLine]) -> str:
    return lines[0].references[0]


def _common_name(names: Sequence[str]) -> str:
    """Return the names' common prefix, such as `emoji_s` for `emoji_s_en`, `emoji_s_zh`, or all."""
    columns = zip(*names, strict=False)
    prefix = "".join(letters[0] for letters in takewhile(lambda x: len(set(x)) == 1, columns))
    return names[0] if len(names) == 1 else prefix.rstrip("_-/ ") or ", ".join(names)
