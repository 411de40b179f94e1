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

NUM_IMAGES = 12  # per data set


@dataclass(frozen=True)
class CaptionLine:
    """A generated caption in one language and the image's references."""

    language: str
    prediction: str
    references: tuple[str, ...]
    hit: bool  # equal to a reference


@dataclass(frozen=True)
class CaptionExample:
    """One image and its captions, one line per language."""

    image: EmbeddedImage
    lines: list[CaptionLine]


@dataclass(frozen=True)
class CaptionExamples:
    """Captions of the images sampled from one data set."""

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
    """Return examples for every source; evaluators of one source, in any language, share them.

    The images are sampled with `seed` from those that have references for all of its evaluators.
    """
    by_source: dict[str, dict[str, Captioning]] = {}
    for name, evaluator in evaluators.items():
        by_source.setdefault(evaluator.source.fingerprint, {})[name] = evaluator
    return [_caption_images(group, predictor, thumbnail, seed) for group in by_source.values()]


def _caption_images(
    evaluators: Mapping[str, Captioning],
    predictor: Predictor,
    thumbnail: Callable[[object], bytes],
    seed: int,
) -> CaptionExamples:
    source = next(iter(evaluators.values())).source
    captioned = set.intersection(*(set(_captioned_indices(e)) for e in evaluators.values()))
    indices = np.random.default_rng(seed).permutation(sorted(captioned))[:NUM_IMAGES]
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
    return CaptionExamples(_common_name(list(evaluators)), len(captioned), examples)


def _captioned_indices(evaluator: Captioning) -> Sequence[int]:
    return evaluator.selected_images(ignore_limit=True).indices


def _caption_line(evaluator: Captioning, caption: str, images: Subset, index: int) -> CaptionLine:
    references = evaluator.references(images, index)
    hit = exact_match([caption], [references])["exact_match"] == 1
    return CaptionLine(evaluator.language, caption, references, hit)


def _alt_text(lines: Sequence[CaptionLine]) -> str:
    return lines[0].references[0]


def _common_name(names: Sequence[str]) -> str:
    """Return the common prefix, `emoji_s` for `emoji_s_en` and `emoji_s_zh`, or else all names."""
    columns = zip(*names, strict=False)
    prefix = "".join(letters[0] for letters in takewhile(lambda x: len(set(x)) == 1, columns))
    return names[0] if len(names) == 1 else prefix.rstrip("_-/ ") or ", ".join(names)
