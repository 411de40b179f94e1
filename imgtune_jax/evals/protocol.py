"""Interfaces of this package: an `Evaluator` computes metrics of a `Predictor` (a trained model).

Axis letters: n images or texts, m texts, d features, l tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from imgtune_jax.data import Source, Tokenizer
from imgtune_jax.models import ImageTextModel
from imgtune_jax.types import TokenScores

T = TypeVar("T")


class CaptionScores(NamedTuple):
    """Token scores of one given caption per image, as NumPy arrays in source order.

    `text_mask` is False for padding, `target_mask` also for the begin token and the prefix, which
    are not scored. `valid` is False for images that could not be read.
    """

    scores: TokenScores
    text_mask: Bool[np.ndarray, "n l"]
    target_mask: Bool[np.ndarray, "n l"]
    valid: Bool[np.ndarray, " n"]


class GeneratedCaption(NamedTuple):
    """A generated caption and its score in nats.

    For greedy decoding and sampling, `score` is the mean log probability of the tokens. For beam
    search, it is their summed log probability divided by length ** length_penalty. Beam search
    sorts an image's captions by score, best first; samples are not sorted.
    """

    text: str
    score: float


class Predictor(Protocol):
    """A trained model as evaluators use it: images and texts in, NumPy arrays out.

    Methods return one row per input, in order; every host gets all rows. An unreadable image also
    has a row. Methods that take images return a mask too, which is False for unreadable images.
    """

    @property
    def logit_scale(self) -> float | None:
        """The factor of cosine similarities (after exp); None for a captioner-only model."""
        ...

    @property
    def logit_bias(self) -> float | None:
        """The constant added to the scaled similarities; None for a model without one."""
        ...

    def memoize(self, key: tuple[Any, ...], compute: Callable[[], T], /) -> T:
        """Return `compute()`, computed once per `key` and set of parameters."""
        ...

    def embed_images(
        self, source: Source, /
    ) -> tuple[Float[np.ndarray, "n d"], Bool[np.ndarray, " n"]]:
        """Return unit-norm image embeddings, and the mask of readable images."""
        ...

    def embed_texts(self, texts: Sequence[str], prefix: str = "", /) -> Float[np.ndarray, "n d"]:
        """Return unit-norm embeddings of the texts, each after `prefix`."""
        ...

    def image_features(
        self, source: Source, /
    ) -> tuple[Float[np.ndarray, "n d"], Bool[np.ndarray, " n"]]:
        """Return pooled image features, before the head, and the mask of readable images."""
        ...

    def text_features(self, texts: Sequence[str], /) -> Float[np.ndarray, "n d"]:
        """Return the text tower's pooled output, before the head."""
        ...

    def caption_scores(
        self, source: Source, texts: Sequence[str], prefix: str = "", /
    ) -> CaptionScores | None:
        """Score texts[i], after `prefix`, as the caption of image i; None without a decoder."""
        ...

    def generate_captions(
        self, source: Source, /, *, prefix: str = "", decoding: Mapping[str, Any] | None = None
    ) -> tuple[list[list[GeneratedCaption]], Bool[np.ndarray, " n"]]:
        """Return captions generated after `prefix` for each image, and the mask of readable images.

        `decoding` has the settings that `decoding.build_generation_config` takes; None is greedy
        decoding. Raises UserError for a model without a decoder.
        """
        ...

    def score_texts(
        self,
        source: Source,
        texts: Sequence[str],
        /,
        *,
        prefix: str = "",
        normalize_length: bool = False,
    ) -> tuple[Float[np.ndarray, "n m"], Bool[np.ndarray, " n"]]:
        """Return log p(text | image, prefix) in nats [n m], and the mask of readable images.

        With `normalize_length`, each log probability is divided by the text's number of tokens.
        Raises UserError for a model without a decoder.
        """
        ...


@runtime_checkable
class Evaluator(Protocol):
    """A frozen dataclass whose fields are its settings.

    Calling it with a predictor returns metrics by name.
    """

    @property
    def task(self) -> str:
        """The task's name in `results.jsonl`: CLIP_benchmark's name if it has this task."""
        ...

    @property
    def language(self) -> str:
        """The language of the texts, for `results.jsonl`."""
        ...

    def __call__(self, predictor: Predictor, /) -> dict[str, float]:
        """Return metrics by name, without those that are undefined for the data."""
        ...

    def metric_names(self) -> tuple[str, ...]:
        """Return the names of all metrics that a call may return."""
        ...

    def check(self, model: ImageTextModel, tokenizer: Tokenizer, /) -> None:
        """Raise UserError if the settings do not fit the sources, the model or the tokenizer.

        It is called before training starts, so it reads few records.
        """
        ...
