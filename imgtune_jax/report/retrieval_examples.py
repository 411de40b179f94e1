"""Real queries and what the model answers: drawn at random, hits and misses alike."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import matplotlib.colors
import numpy as np
from jaxtyping import Float, Int

from imgtune_jax.evals.retrieval import retrieval_metrics

MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp"}


@dataclass(frozen=True)
class RetrievalData:
    """Images and captions of one data set, embedded by the model.

    `thumbnails` are PNG, JPEG or WebP files; only those shown are asked for, so a sequence may
    make them on demand. `image_of_text` and `image_group` are as in `retrieval_metrics`.
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
        n, m = len(self.image_emb), len(self.text_emb)
        lengths = len(self.thumbnails), len(self.captions), len(self.image_of_text)
        if lengths != (n, m, m):
            raise ValueError(
                f"gallery {self.dataset!r} has {n} image and {m} text embeddings, but "
                f"{lengths[0]} thumbnails, {lengths[1]} captions, {lengths[2]} image_of_text"
            )

    def groups(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
        """What an image and a caption must share to belong together."""
        of_image = np.arange(len(self.image_emb)) if self.image_group is None else self.image_group
        return np.asarray(of_image), np.asarray(of_image)[self.image_of_text]

    def image(self, index: int) -> EmbeddedImage:
        """A thumbnail with its first caption as the words for it."""
        own = np.flatnonzero(np.asarray(self.image_of_text) == index)
        words = self.captions[int(own[0])] if own.size else "an image without a caption"
        return EmbeddedImage(data_uri(self.thumbnails[int(index)]), words)


@dataclass(frozen=True)
class EmbeddedImage:
    """An image in the page."""

    uri: str
    alt: str


@dataclass(frozen=True)
class RetrievedItem:
    """One retrieved candidate, a picture or a caption."""

    rank: int  # from 1
    score: float
    hit: bool
    picture: EmbeddedImage | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Query:
    """A query, its first answers, and the best right answer where that came later."""

    answers: list[RetrievedItem]
    first_positive: RetrievedItem | None
    picture: EmbeddedImage | None = None
    caption: str | None = None

    @property
    def rank(self) -> int:
        """The best right answer's rank, from 1."""
        return next(
            (a.rank for a in self.answers if a.hit),
            self.first_positive.rank if self.first_positive else 0,
        )


@dataclass(frozen=True)
class HeatCell:
    """One similarity: its colour, the ink that is legible on it, and whether the pair is right."""

    value: float
    colour: str
    ink: str
    right: bool


@dataclass(frozen=True)
class Heatmap:
    """Cosine similarities of sampled pairs; row i's caption belongs to column i's image."""

    pictures: list[EmbeddedImage]
    captions: list[str]
    cells: list[list[HeatCell]]
    low: float
    high: float
    gradient: str  # CSS colours from low to high


@dataclass(frozen=True)
class RetrievalExamples:
    """All that the page shows of one gallery."""

    dataset: str
    language: str
    num_images: int
    num_texts: int
    recalls: dict[str, float]  # over the whole set
    text_queries: list[Query]
    image_queries: list[Query]
    heatmap: Heatmap


def sample_examples(
    gallery: RetrievalData, *, queries: int = 10, answers: int = 5, pairs: int = 20, seed: int = 0
) -> RetrievalExamples:
    """Draw `queries` texts, `queries` images and `pairs` pairs, and look their answers up."""
    rng = np.random.default_rng(seed)
    of_image, of_text = gallery.groups()
    captioned = np.unique(gallery.image_of_text)
    texts = rng.permutation(len(of_text))[:queries]
    images = rng.permutation(captioned)[:queries]
    return RetrievalExamples(
        dataset=gallery.dataset,
        language=gallery.language,
        num_images=len(of_image),
        num_texts=len(of_text),
        recalls=retrieval_metrics(
            gallery.image_emb,
            gallery.text_emb,
            gallery.image_of_text,
            image_group=gallery.image_group,
        ),
        text_queries=[_text_query(gallery, int(t), answers) for t in texts],
        image_queries=[_image_query(gallery, int(i), answers) for i in images],
        heatmap=_heatmap(gallery, rng.permutation(captioned)[:pairs]),
    )


def data_uri(file: bytes) -> str:
    """A picture file as a `data:` address. Raises ValueError for a format browsers may not show."""
    for magic, kind in MAGIC.items():
        if file.startswith(magic):
            return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"
    raise ValueError(f"a thumbnail starts with {file[:8]!r}; give PNG, JPEG or WebP files")


def _text_query(gallery: RetrievalData, text: int, k: int) -> Query:
    of_image, of_text = gallery.groups()
    scores = gallery.image_emb @ gallery.text_emb[text]
    order, hits = _ordered(scores, of_image == of_text[text])

    def answer(place: int) -> RetrievedItem:
        image = int(order[place])
        score = float(scores[image])
        return RetrievedItem(place + 1, score, bool(hits[place]), picture=gallery.image(image))

    return Query(*_answers(answer, hits, k), caption=gallery.captions[text])


def _image_query(gallery: RetrievalData, image: int, k: int) -> Query:
    of_image, of_text = gallery.groups()
    scores = gallery.text_emb @ gallery.image_emb[image]
    order, hits = _ordered(scores, of_text == of_image[image])

    def answer(place: int) -> RetrievedItem:
        text = int(order[place])
        score = float(scores[text])
        return RetrievedItem(place + 1, score, bool(hits[place]), caption=gallery.captions[text])

    return Query(*_answers(answer, hits, k), picture=gallery.image(image))


def _ordered(scores: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-scores, kind="stable")
    return order, right[order]


def _answers(answer, hits: np.ndarray, k: int) -> tuple[list[RetrievedItem], RetrievedItem | None]:
    first = int(hits.argmax())
    shown = [answer(place) for place in range(min(k, len(hits)))]
    return shown, None if first < k else answer(first)


def _heatmap(gallery: RetrievalData, images: Int[np.ndarray, " k"]) -> Heatmap:
    of_image, of_text = gallery.groups()
    texts = [int(np.flatnonzero(gallery.image_of_text == i)[0]) for i in images]
    scores = gallery.text_emb[texts] @ gallery.image_emb[images].T
    right = of_text[texts][:, None] == of_image[images][None, :]
    low, high = float(scores.min()), float(scores.max())
    colours = matplotlib.colormaps["viridis"]

    def cell(score: float, is_right: bool) -> HeatCell:
        share = (score - low) / (high - low) if high > low else 0.5
        return HeatCell(
            score,
            colour=matplotlib.colors.to_hex(colours(share)),
            ink="#000" if share > 0.55 else "#fff",
            right=is_right,
        )

    return Heatmap(
        pictures=[gallery.image(int(i)) for i in images],
        captions=[gallery.captions[t] for t in texts],
        cells=[
            [cell(float(s), bool(r)) for s, r in zip(*row, strict=True)]
            for row in zip(scores, right, strict=True)
        ],
        low=low,
        high=high,
        gradient=", ".join(matplotlib.colors.to_hex(colours(x)) for x in np.linspace(0, 1, 9)),
    )
