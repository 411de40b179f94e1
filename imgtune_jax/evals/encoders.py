"""A trained model as evaluators and users see it: images and texts in, NumPy rows out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from imgtune_jax import data, models
from imgtune_jax.evals.protocol import Source
from imgtune_jax.partition import Partitioner
from imgtune_jax.types import Params

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
    def logit_scale(self) -> float:
        """The multiplier of cosine similarities, after exp."""
        return float(self.model.logit_scale(self.params))

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

    def _pass(self, source: Source) -> tuple[Rows, Bool[np.ndarray, " n"]]:
        pipeline = data.Pipeline(
            source=source,
            transform=self.preprocess,
            batch_size=self._batch_size,
            host_index=jax.process_index(),
            host_count=jax.process_count(),
            max_bad_fraction=1.0,  # an evaluator reports what it could not read; it does not stop
        )
        rows, valid = [], []
        for batch in pipeline.one_pass():
            placed = self.partitioner.put(batch)
            rows.append(np.asarray(self.programs["features"](self.params, placed.image)))
            valid.append(
                np.asarray(jax.device_put(placed.example_mask, self.partitioner.replicated))
            )
        n = len(source)
        return np.concatenate(rows)[:n], np.concatenate(valid)[:n]

    def _rows(self, program: str, arrays: tuple[np.ndarray, ...]) -> Rows:
        """Run a program over rows that every host holds, padded to whole batches."""
        n, size = len(arrays[0]), self._batch_size
        out = []
        for start in range(0, n, size):
            part = [a[start : start + size] for a in arrays]
            padded = [np.pad(a, [(0, size - len(a))] + [(0, 0)] * (a.ndim - 1)) for a in part]
            placed = [self.partitioner.put_global(a) for a in padded]
            out.append(np.asarray(self.programs[program](self.params, *placed))[: len(part[0])])
        if not out:
            raise ValueError("nothing to encode: got an empty list")
        return np.concatenate(out)
