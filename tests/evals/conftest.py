"""Fakes for tests of evaluators: sources that are lists of records, and a fake predictor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from imgtune_jax.evals.protocol import CaptionScores, GeneratedCaption
from imgtune_jax.types import TokenScores

GOLDEN = Path(__file__).parents[1] / "golden"


def unit(x):
    """Scale rows to norm 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@dataclass(frozen=True)
class FakePredictor:
    """A predictor whose image embedding is the record's `image` (None: unreadable).

    Text embeddings are looked up in `text_emb`. `calls` records the arguments that are passed to
    `embed_texts`, `generate_captions` and `score_texts`.
    """

    text_emb: Mapping[str, np.ndarray] = field(default_factory=dict)
    logit_scale: float = 10.0
    logit_bias: float | None = None
    calls: list = field(default_factory=list)
    memo: dict = field(default_factory=dict)

    def memoize(self, key, compute):
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    def embed_images(self, source):
        emb, valid = self.image_features(source)
        return np.where(valid[:, None], unit(np.where(valid[:, None], emb, 1)), 0), valid

    def embed_texts(self, texts: Sequence[str], prefix: str = ""):
        self.calls.append(list(texts))
        return unit(np.stack([self.text_emb[prefix + t] for t in texts])).astype(np.float32)

    def text_features(self, texts: Sequence[str]):
        return 3.0 * self.embed_texts(texts)

    def image_features(self, source):
        images = [source[i].image for i in range(len(source))]
        valid = np.array([x is not None for x in images])
        width = next(len(x) for x in images if x is not None)
        rows = [np.zeros(width) if x is None else x for x in images]
        return np.stack(rows).astype(np.float32), valid

    def generate_captions(self, source, *, prefix="", decoding=None):
        """Return the prefix followed by the record's `image`, which is a string here."""
        images = [source[i].image for i in range(len(source))]
        self.calls.append((prefix, decoding, images))
        captions = [[] if x is None else [GeneratedCaption(prefix + x, -1.0)] for x in images]
        return captions, np.array([x is not None for x in images])

    def score_texts(self, source, texts, *, prefix="", normalize_length=False):
        """Return inner products of the records' `image` with the vectors of `prefix` + text."""
        features, valid = self.image_features(source)
        self.calls.append((list(texts), normalize_length))
        return features @ np.stack([self.text_emb[prefix + t] for t in texts], 1), valid

    def caption_scores(self, source, texts, prefix=""):
        """Return log probabilities -1, -2, … of the tokens of each text, one token per letter."""
        if not isinstance(source[0].image, str):
            return None
        length = 1 + max(map(len, texts))
        mask = np.arange(length) < np.array([[1 + len(t)] for t in texts])
        log_prob = np.broadcast_to(-np.arange(1.0, length), (len(texts), length - 1))
        scores = TokenScores(log_prob, *[np.zeros_like(log_prob)] * 3)
        valid = np.array([source[i].image is not None for i in range(len(source))])
        return CaptionScores(scores, mask, mask & (np.arange(length) > 0), valid)


class FakeSource(list):
    """A list of records whose fingerprint is the list's id."""

    @property
    def fingerprint(self):
        return str(id(self))


def record(image, *captions, label=None, group=None, **sets):
    """Return a record; `captions` are its caption set `caption`, `sets` are other caption sets."""
    named = {"caption": captions} if captions else {}
    return SimpleNamespace(image=image, captions=named | sets, label=label, group=group)


@pytest.fixture
def golden():
    """Return a function that loads a golden case: `golden("evals_clip_benchmark", "retrieval")`."""

    def load(name: str, case: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz") as file:
            return {k.split("/", 1)[1]: file[k] for k in file.files if k.startswith(case + "/")}

    return load


@pytest.fixture
def fakes():
    """Return the fakes and helpers of this file."""
    return SimpleNamespace(Predictor=FakePredictor, Source=FakeSource, record=record, unit=unit)
