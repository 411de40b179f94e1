"""What an evaluator is, and what it is given: encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from imgtune_jax.data import Source
from imgtune_jax.types import TokenScores

T = TypeVar("T")


class CaptionScores(NamedTuple):
    """What a captioner says of one given caption an image, NumPy rows in order.

    `valid` is False for images that could not be read.
    """

    scores: TokenScores
    text_mask: Bool[np.ndarray, "n l"]
    target_mask: Bool[np.ndarray, "n l"]
    valid: Bool[np.ndarray, " n"]


class GeneratedCaption(NamedTuple):
    """A caption that a model wrote; `score` orders an image's captions, best first.

    Beam search: the sum of the tokens' log probabilities over length ** length_penalty; otherwise
    their mean. In nats.
    """

    text: str
    score: float


class Predictor(Protocol):
    """A trained model, as evaluators see it: images and texts in, NumPy rows out.

    Rows come in the order of what was asked. Every host gets all rows. A broken image keeps its
    row, and its entry of the mask is False.
    """

    @property
    def logit_scale(self) -> float | None:
        """The multiplier of the cosine similarities, after exp; None for a mere captioner."""
        ...

    @property
    def logit_bias(self) -> float | None:
        """What is added to the scaled similarities; None for a model that has no bias."""
        ...

    def memoize(self, key: tuple[Any, ...], compute: Callable[[], T], /) -> T:
        """What `compute` gives, computed once for these parameters and this key."""
        ...

    def embed_images(
        self, source: Source, /
    ) -> tuple[Float[np.ndarray, "n d"], Bool[np.ndarray, " n"]]:
        """Unit-norm image embeddings, and which of them are of images that could be read."""
        ...

    def embed_texts(self, texts: Sequence[str], /) -> Float[np.ndarray, "n d"]:
        """Unit-norm text embeddings."""
        ...

    def image_features(
        self, source: Source, /
    ) -> tuple[Float[np.ndarray, "n d"], Bool[np.ndarray, " n"]]:
        """The image tower's pooled output, before the head, for probes; and the same mask."""
        ...

    def text_features(self, texts: Sequence[str], /) -> Float[np.ndarray, "n d"]:
        """The text tower's pooled output, before the head."""
        ...

    def caption_scores(
        self, source: Source, texts: Sequence[str], prefix: str = "", /
    ) -> CaptionScores | None:
        """How likely each image's text is, behind a prefix; None for a model without a decoder."""
        ...

    def generate_captions(
        self, source: Source, /, *, prefix: str = "", decoding: Mapping[str, Any] | None = None
    ) -> tuple[list[list[GeneratedCaption]], Bool[np.ndarray, " n"]]:
        """What the model writes of each image behind `prefix`, best first; and the same mask.

        `decoding` is what `decoding.build` takes, None is greedy. Raises ValueError for a model
        that does not write.
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
    ) -> tuple[Float[np.ndarray, "n a"], Bool[np.ndarray, " n"]]:
        """log p of each text for each image behind `prefix`, in nats; and the same mask.

        A token, if `normalize_length`. Raises ValueError for a model that does not write.
        """
        ...


@runtime_checkable
class Evaluator(Protocol):
    """A frozen dataclass: its fields say on what and how; a call says how well."""

    @property
    def task(self) -> str:
        """The task's name in `results.jsonl` (CLIP_benchmark's, where it has one)."""
        ...

    @property
    def language(self) -> str:
        """The language of the texts, for `results.jsonl`."""
        ...

    def __call__(self, encoders: Predictor, /) -> dict[str, float]:
        """Finite numbers by name; a number that is not defined is left out."""
        ...
