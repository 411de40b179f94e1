"""Retrieval examples: random queries, each with the candidates that the model ranks first."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import matplotlib.colors
import numpy as np
from jaxtyping import Bool, Float, Int

from imgtune_jax.errors import UserError
from imgtune_jax.evals.retrieval import retrieval_metrics

IMAGE_SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp"}


@dataclass(frozen=True)
class RetrievalData:
    """Images and captions of one data set with the model's embeddings.

    `thumbnails` are PNG, JPEG or WebP files. Only the thumbnails that the page shows are accessed,
    so the sequence may create them on access. `image_of_text` and `image_group` are as in
    `retrieval_metrics`. Axis letters: n images, m captions, d features.
    """

    dataset: str
    thumbnails: Sequence[bytes]
    captions: Sequence[str]
    image_emb: Float[np.ndarray, "n d"]
    text_emb: Float[np.ndarray, "m d"]
    image_of_text: Int[np.ndarray, " m"]
    image_group: Int[np.ndarray, " n"] | None = None
    language: str = "en"

    def __post_init__(self) -> None:
        """Raise UserError for fields of different lengths."""
        n, m = len(self.image_emb), len(self.text_emb)
        lengths = len(self.thumbnails), len(self.captions), len(self.image_of_text)
        if lengths != (n, m, m):
            raise UserError(
                f"retrieval data {self.dataset!r} has {n} image and {m} text embeddings, but "
                f"{lengths[0]} thumbnails, {lengths[1]} captions, {lengths[2]} image_of_text; "
                "expected one thumbnail per image, and one caption and image_of_text per text"
            )

    def groups(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
        """Return the group of each image and of each caption; equal groups match."""
        group = np.arange(len(self.image_emb)) if self.image_group is None else self.image_group
        return np.asarray(group), np.asarray(group)[self.image_of_text]

    def image(self, index: int) -> EmbeddedImage:
        """Return the thumbnail of image `index`; the alternative text is its first caption."""
        texts = np.flatnonzero(np.asarray(self.image_of_text) == index)
        alt = self.captions[int(texts[0])] if texts.size else "an image without a caption"
        return EmbeddedImage(data_uri(self.thumbnails[int(index)]), alt)


@dataclass(frozen=True)
class EmbeddedImage:
    """An image that is embedded in the page as a data URI, with its alternative text."""

    uri: str
    alt: str


@dataclass(frozen=True)
class RetrievedItem:
    """One retrieved candidate: an image or a caption."""

    rank: int  # from 1
    score: float
    hit: bool
    image: EmbeddedImage | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Query:
    """A query with the candidates that are ranked first (`answers`).

    `first_positive` is the best-ranked positive if it comes after the answers, else None.
    """

    answers: list[RetrievedItem]
    first_positive: RetrievedItem | None
    image: EmbeddedImage | None = None
    caption: str | None = None

    @property
    def rank(self) -> int:
        """The rank of the best positive, from 1; 0 if the query has no positive."""
        return next(
            (a.rank for a in self.answers if a.hit),
            self.first_positive.rank if self.first_positive else 0,
        )


@dataclass(frozen=True)
class HeatCell:
    """One similarity, with its background color and a text color (`ink`) that is legible on it."""

    value: float
    color: str
    ink: str
    positive: bool  # image and caption match


@dataclass(frozen=True)
class Heatmap:
    """Cosine similarities of sampled pairs: one row per caption, one column per image.

    Caption i belongs to image i. `low` and `high` are the smallest and the largest similarity.
    """

    images: list[EmbeddedImage]
    captions: list[str]
    cells: list[list[HeatCell]]
    low: float
    high: float
    gradient: str  # comma-separated CSS colors from `low` to `high`


@dataclass(frozen=True)
class RetrievalExamples:
    """Recalls, sampled queries and a heat map of one data set."""

    dataset: str
    language: str
    num_images: int
    num_texts: int
    recalls: dict[str, float]  # over the full data set
    text_queries: list[Query]
    image_queries: list[Query]
    heatmap: Heatmap


def sample_examples(
    data: RetrievalData, *, queries: int = 10, answers: int = 5, pairs: int = 20, seed: int = 0
) -> RetrievalExamples:
    """Sample `queries` texts and as many images as queries, and `pairs` pairs for a heat map.

    Each query has the `answers` candidates that are ranked first. Images without a caption are not
    sampled.
    """
    rng = np.random.default_rng(seed)
    image_group, text_group = data.groups()
    captioned = np.unique(data.image_of_text)
    texts = rng.permutation(len(text_group))[:queries]
    images = rng.permutation(captioned)[:queries]
    return RetrievalExamples(
        dataset=data.dataset,
        language=data.language,
        num_images=len(image_group),
        num_texts=len(text_group),
        recalls=retrieval_metrics(
            data.image_emb, data.text_emb, data.image_of_text, image_group=data.image_group
        ),
        text_queries=[_text_query(data, int(t), answers) for t in texts],
        image_queries=[_image_query(data, int(i), answers) for i in images],
        heatmap=_heatmap(data, rng.permutation(captioned)[:pairs]),
    )


def data_uri(file: bytes) -> str:
    """Return the data URI of an image file. Raises UserError unless it is PNG, JPEG or WebP."""
    for signature, kind in IMAGE_SIGNATURES.items():
        if file.startswith(signature):
            return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"
    raise UserError(f"a thumbnail starts with {file[:8]!r}; expected a PNG, JPEG or WebP file")


def _text_query(data: RetrievalData, text: int, num_answers: int) -> Query:
    image_group, text_group = data.groups()
    answers, first_positive = _retrieve(
        data.image_emb @ data.text_emb[text],
        image_group == text_group[text],
        num_answers,
        lambda index: {"image": data.image(index)},
    )
    return Query(answers, first_positive, caption=data.captions[text])


def _image_query(data: RetrievalData, image: int, num_answers: int) -> Query:
    image_group, text_group = data.groups()
    answers, first_positive = _retrieve(
        data.text_emb @ data.image_emb[image],
        text_group == image_group[image],
        num_answers,
        lambda index: {"caption": data.captions[index]},
    )
    return Query(answers, first_positive, image=data.image(image))


def _retrieve(
    scores: Float[np.ndarray, " n"],
    positive: Bool[np.ndarray, " n"],
    num_answers: int,
    shown_fields: Callable[[int], Mapping[str, Any]],
) -> tuple[list[RetrievedItem], RetrievedItem | None]:
    """Return the `num_answers` candidates with the highest scores.

    The second result is the best positive if it comes after them, else None. `shown_fields` returns
    the fields `image` or `caption` of the `RetrievedItem` for a candidate's index.
    """
    order = np.argsort(-scores, kind="stable")
    hits = positive[order]

    def retrieved_item(position: int) -> RetrievedItem:
        index = int(order[position])
        score, hit = float(scores[index]), bool(hits[position])
        return RetrievedItem(position + 1, score, hit, **shown_fields(index))

    first = int(hits.argmax())
    items = [retrieved_item(position) for position in range(min(num_answers, len(hits)))]
    return items, None if first < num_answers else retrieved_item(first)


def _heatmap(data: RetrievalData, images: Int[np.ndarray, " k"]) -> Heatmap:
    image_group, text_group = data.groups()
    texts = [int(np.flatnonzero(data.image_of_text == i)[0]) for i in images]
    scores = data.text_emb[texts] @ data.image_emb[images].T
    positive = text_group[texts][:, None] == image_group[images][None, :]
    low, high = float(scores.min()), float(scores.max())
    colormap = matplotlib.colormaps["viridis"]

    def cell(score: float, is_positive: bool) -> HeatCell:
        fraction = (score - low) / (high - low) if high > low else 0.5
        return HeatCell(
            score,
            color=matplotlib.colors.to_hex(colormap(fraction)),
            ink="#000" if fraction > 0.55 else "#fff",
            positive=is_positive,
        )

    return Heatmap(
        images=[data.image(int(i)) for i in images],
        captions=[data.captions[t] for t in texts],
        cells=[
            [cell(float(s), bool(p)) for s, p in zip(*row, strict=True)]
            for row in zip(scores, positive, strict=True)
        ],
        low=low,
        high=high,
        gradient=", ".join(matplotlib.colors.to_hex(colormap(x)) for x in np.linspace(0, 1, 9)),
    )
