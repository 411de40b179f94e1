"""What the model writes of sampled images, beside what people wrote."""

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

SHOWN = 12  # images of a data set


@dataclass(frozen=True)
class CaptionLine:
    """A prediction in one language, and the references."""

    language: str
    prediction: str
    references: tuple[str, ...]
    hit: bool  # equal to a reference


@dataclass(frozen=True)
class CaptionExample:
    """One image and what is written of it, language by language."""

    picture: EmbeddedImage
    lines: list[CaptionLine]


@dataclass(frozen=True)
class CaptionExamples:
    """All that the page shows of the captions of one data set."""

    dataset: str
    num_images: int
    images: list[CaptionExample]


def caption_views(
    evaluators: Mapping[str, Captioning],
    encoders: Predictor,
    *,
    thumbnail: Callable[[object], bytes],
    seed: int = 0,
) -> list[CaptionExamples]:
    """One view for all evaluators of one source, whatever their languages.

    The images are drawn with `seed` among those that every one of them has references for.
    """
    by_source: dict[str, dict[str, Captioning]] = {}
    for name, evaluator in evaluators.items():
        by_source.setdefault(evaluator.source.fingerprint, {})[name] = evaluator
    return [_view(group, encoders, thumbnail, seed) for group in by_source.values()]


def _view(
    group: Mapping[str, Captioning],
    encoders: Predictor,
    thumbnail: Callable[[object], bytes],
    seed: int,
) -> CaptionExamples:
    source = next(iter(group.values())).source
    common = set.intersection(*(set(_captioned(e)) for e in group.values()))
    drawn = np.random.default_rng(seed).permutation(sorted(common))[:SHOWN]
    chosen = Subset(source, tuple(drawn.tolist()))
    lines: list[list[CaptionLine]] = [[] for _ in drawn]
    readable = np.ones(len(drawn), bool)
    for evaluator in group.values():
        written, readable = evaluator.generate_captions(encoders, chosen)
        for i in np.flatnonzero(readable).tolist():
            lines[i].append(_line(evaluator, written[i][0].text, chosen, i))
    shown = [i for i in np.flatnonzero(readable).tolist() if lines[i]]
    images = [
        CaptionExample(
            EmbeddedImage(data_uri(thumbnail(chosen[i].image)), _alt_text(lines[i])), lines[i]
        )
        for i in shown
    ]
    return CaptionExamples(_common_name(list(group)), len(common), images)


def _captioned(evaluator: Captioning) -> Sequence[int]:
    return evaluator.selected_images(whole=True).indices


def _line(evaluator: Captioning, text: str, chosen: Subset, index: int) -> CaptionLine:
    references = evaluator.references(chosen, index)
    hit = exact_match([text], [references])["exact_match"] == 1
    return CaptionLine(evaluator.language, text, references, hit)


def _alt_text(lines: Sequence[CaptionLine]) -> str:
    return lines[0].references[0]


def _common_name(names: Sequence[str]) -> str:
    """`emoji_s` of `emoji_s_en` and `emoji_s_zh`; all names where they share no beginning."""
    places = zip(*names, strict=False)
    start = "".join(letters[0] for letters in takewhile(lambda x: len(set(x)) == 1, places))
    return names[0] if len(names) == 1 else start.rstrip("_-/ ") or ", ".join(names)
