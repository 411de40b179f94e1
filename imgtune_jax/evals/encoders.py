"""A trained model as evaluators and users see it: images and texts in, NumPy rows out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from imgtune_jax import data, models
from imgtune_jax.evals.protocol import CaptionScores, Source
from imgtune_jax.partition import Partitioner
from imgtune_jax.types import Batch, Params

BATCH_SIZE = 128
Rows = Float[np.ndarray, "n d"]


@dataclass(frozen=True)
class ModelEncoders:
    """Encodes in fixed-size, sharded batches; the padding of the last one never comes out.

    The image tower's features are computed once a source and kept in `kept` (None: not kept). They
    outlive a change of parameters when the tower is wholly locked, so judging again during
    training costs the head alone.
    """

    model: models.Model
    params: Params
    preprocess: data.Compose
    tokenizer: data.Tokenizer
    partitioner: Partitioner
    image_is_locked: bool
    programs: dict[str, Callable[..., Any]]
    kept: dict[str, tuple[Rows, Bool[np.ndarray, " n"]]] | None

    @classmethod
    def build(
        cls,
        model: models.Model,
        params: Params,
        *,
        preprocess: data.Compose,
        tokenizer: data.Tokenizer,
        partitioner: Partitioner,
        image_is_locked: bool,
        keep: bool,
    ) -> ModelEncoders:
        """Compile lazily, once for all parameters that come later through `with_params`."""
        functions = {
            "head": model.encode_image_features,
            "features": model.features_image,
            "text": model.encode_text,
            "text_features": model.features_text,
        }
        if model.decoder is not None:
            functions["captions"] = lambda params, image, text, mask: model.caption_scores(
                params, model.image_tokens(params, image), text, mask
            )
        programs = {
            name: jax.jit(f, out_shardings=partitioner.replicated) for name, f in functions.items()
        }
        return cls(
            model,
            params,
            preprocess,
            tokenizer,
            partitioner,
            image_is_locked,
            programs,
            kept={} if keep else None,
        )

    def with_params(self, params: Params) -> ModelEncoders:
        """The same programs with other parameters, of which a locked tower's are the same."""
        keep_old = self.kept is None or self.image_is_locked
        return dataclasses.replace(self, params=params, kept=self.kept if keep_old else {})

    @property
    def logit_scale(self) -> float | None:
        """The multiplier of cosine similarities, after exp; None for a mere captioner."""
        scale = self.model.logit_scale(self.params)
        return None if scale is None else float(scale)

    @property
    def logit_bias(self) -> float | None:
        """What is added to the scaled similarities; None for a model that has none."""
        return float(self.params["logit_bias"]) if "logit_bias" in self.params else None

    def images(self, source: Source, /) -> tuple[Rows, Bool[np.ndarray, " n"]]:
        """Unit-norm image embeddings in source order; False marks images that could not be read."""
        features, valid = self.features(source)
        return self._rows("head", (features,)), valid

    def features(self, source: Source, /) -> tuple[Rows, Bool[np.ndarray, " n"]]:
        """The image tower's pooled output, before the head, in source order."""
        if self.kept is None:
            return self._pass(source)
        if source.fingerprint not in self.kept:
            self.kept[source.fingerprint] = self._pass(source)
        return self.kept[source.fingerprint]

    def texts(self, texts: Sequence[str], /) -> Rows:
        """Unit-norm text embeddings, in order."""
        return self._rows("text", self.tokenizer(list(texts)))

    def text_features(self, texts: Sequence[str], /) -> Rows:
        """The text tower's pooled output, before the head, in order."""
        return self._rows("text_features", self.tokenizer(list(texts)))

    @property
    def _batch_size(self) -> int:
        n = self.partitioner.batch_devices
        return -(-BATCH_SIZE // n) * n

    def caption_scores(
        self, source: Source, texts: Sequence[str], prefix: str = "", /
    ) -> CaptionScores | None:
        """How likely each image's text is, behind a prefix; None for a model without a decoder."""
        if self.model.decoder is None:
            return None
        ids, mask, targets = self.tokenizer.prompted([prefix] * len(texts), texts)
        size, rows, valid = self._batch_size, [], []
        for i, placed in enumerate(self._pictures(source)):
            part = [_padded(x[i * size : (i + 1) * size], size) for x in (ids, mask)]
            arrays = [placed.image, *map(self.partitioner.put_global, part)]
            rows.append(jax.device_get(self.programs["captions"](self.params, *arrays)))
            valid.append(self._whole(placed.example_mask))
        n = len(texts)
        scores = jax.tree.map(lambda *parts: np.concatenate(parts)[:n], *rows)
        return CaptionScores(scores, mask, targets, np.concatenate(valid)[:n])

    def _pass(self, source: Source) -> tuple[Rows, Bool[np.ndarray, " n"]]:
        rows, valid = [], []
        for placed in self._pictures(source):
            rows.append(np.asarray(self.programs["features"](self.params, placed.image)))
            valid.append(self._whole(placed.example_mask))
        n = len(source)
        return np.concatenate(rows)[:n], np.concatenate(valid)[:n]

    def _whole(self, x: jax.Array) -> np.ndarray:
        return np.asarray(jax.device_put(x, self.partitioner.replicated))

    def _pictures(self, source: Source) -> Iterator[Batch]:
        """A source's images in order, in batches on the mesh; the last one is padded."""
        pipeline = data.Pipeline(
            source=source,
            transform=self.preprocess,
            batch_size=self._batch_size,
            host_index=jax.process_index(),
            host_count=jax.process_count(),
            max_bad_fraction=1.0,  # an evaluator reports what it could not read; it does not stop
        )
        return map(self.partitioner.put, pipeline.one_pass())

    def _rows(self, program: str, arrays: tuple[np.ndarray, ...]) -> Rows:
        """Run a program over rows that every host holds, padded to whole batches."""
        n, size = len(arrays[0]), self._batch_size
        out = []
        for start in range(0, n, size):
            part = [a[start : start + size] for a in arrays]
            placed = [self.partitioner.put_global(_padded(a, size)) for a in part]
            out.append(np.asarray(self.programs[program](self.params, *placed))[: len(part[0])])
        if not out:
            raise ValueError("nothing to encode: got an empty list")
        return np.concatenate(out)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    return np.pad(rows, [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1))
