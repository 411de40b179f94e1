"""Fakes for evaluators: records in a list, and encoders that look embeddings up."""

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
    """Rows of norm 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@dataclass(frozen=True)
class FakeEncoders:
    """A record's `image` is its embedding (None: broken); texts are looked up by their string."""

    text_emb: Mapping[str, np.ndarray] = field(default_factory=dict)
    logit_scale: float = 10.0
    logit_bias: float | None = None
    asked: list = field(default_factory=list)
    shared: dict = field(default_factory=dict)

    def once(self, key, compute):
        if key not in self.shared:
            self.shared[key] = compute()
        return self.shared[key]

    def images(self, source):
        emb, valid = self.features(source)
        return np.where(valid[:, None], unit(np.where(valid[:, None], emb, 1)), 0), valid

    def texts(self, texts: Sequence[str]):
        self.asked.append(list(texts))
        return unit(np.stack([self.text_emb[t] for t in texts])).astype(np.float32)

    def text_features(self, texts: Sequence[str]):
        return 3.0 * self.texts(texts)

    def features(self, source):
        images = [source[i].image for i in range(len(source))]
        valid = np.array([x is not None for x in images])
        width = next(len(x) for x in images if x is not None)
        rows = [np.zeros(width) if x is None else x for x in images]
        return np.stack(rows).astype(np.float32), valid

    def captions(self, source, *, prefix="", decoding=None):
        """The prefix and a record's `image`, which is a text here."""
        images = [source[i].image for i in range(len(source))]
        self.asked.append((prefix, decoding, images))
        written = [[] if x is None else [GeneratedCaption(prefix + x, -1.0)] for x in images]
        return written, np.array([x is not None for x in images])

    def answer_scores(self, source, texts, *, prefix="", normalize_length=False):
        """Inner products of a record's `image` with the text's vector, behind the prefix."""
        features, valid = self.features(source)
        self.asked.append((list(texts), normalize_length))
        return features @ np.stack([self.text_emb[prefix + t] for t in texts], 1), valid

    def caption_scores(self, source, texts, prefix=""):
        """Log probabilities -1, -2, … of as many tokens as a text has letters."""
        if not isinstance(source[0].image, str):
            return None
        length = 1 + max(map(len, texts))
        mask = np.arange(length) < np.array([[1 + len(t)] for t in texts])
        log_prob = np.broadcast_to(-np.arange(1.0, length), (len(texts), length - 1))
        scores = TokenScores(log_prob, *[np.zeros_like(log_prob)] * 3)
        valid = np.array([source[i].image is not None for i in range(len(source))])
        return CaptionScores(scores, mask, mask & (np.arange(length) > 0), valid)


class FakeSource(list):
    """Records, and a fingerprint that tells one list from another."""

    @property
    def fingerprint(self):
        return str(id(self))


def record(image, *captions, label=None, group=None, **sets):
    """One record; `captions` go into the set called `caption`."""
    named = {"caption": captions} if captions else {}
    return SimpleNamespace(image=image, captions=named | sets, label=label, group=group)


@pytest.fixture
def golden():
    """Arrays of a stored case: `golden("evals_clip_benchmark", "retrieval")`."""

    def load(name: str, case: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz") as file:
            return {k.split("/", 1)[1]: file[k] for k in file.files if k.startswith(case + "/")}

    return load


@pytest.fixture
def fakes():
    """The fakes above, by name."""
    return SimpleNamespace(Encoders=FakeEncoders, Source=FakeSource, record=record, unit=unit)
