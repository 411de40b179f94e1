"""A trained model as evaluators and users see it: images and texts in, NumPy rows out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from imgtune_jax import data, decoding, models
from imgtune_jax.evals.protocol import CaptionScores, Source, T, Written
from imgtune_jax.evals.writing import Writer
from imgtune_jax.partition import Partitioner
from imgtune_jax.types import Batch, Params

BATCH_SIZE = 128
ANSWER_LOGITS = 1 << 28  # bytes, over all devices
KEPT_TOKENS = 1 << 30  # bytes; a source with more image tokens has them computed anew
Rows = Float[np.ndarray, "n d"]


@dataclass(frozen=True)
class ModelEncoders:
    """Encodes in fixed-size, sharded batches; the padding of the last one never comes out.

    What the image side gives of a source is computed once and kept in `kept` (None: not kept). It
    outlives a change of parameters when the image side is wholly locked, so judging again during
    training costs the head or the decoder alone. What evaluators share through `once` does not.
    """

    model: models.Model
    params: Params
    preprocess: data.Compose
    tokenizer: data.Tokenizer
    partitioner: Partitioner
    image_is_locked: bool
    programs: dict[Any, Callable[..., Any]]
    kept: dict[tuple[str, str], tuple[np.ndarray, Bool[np.ndarray, " n"]]] | None
    shared: dict[tuple[Any, ...], Any] | None

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
            functions["caption_scores"] = model.caption_scores
        programs: dict[Any, Callable[..., Any]] = {
            name: jax.jit(f, out_shardings=partitioner.replicated) for name, f in functions.items()
        }
        programs["tokens"] = jax.jit(model.image_tokens, out_shardings=partitioner.by_batch)
        return cls(
            model,
            params,
            preprocess,
            tokenizer,
            partitioner,
            image_is_locked,
            programs,
            kept={} if keep else None,
            shared={} if keep else None,
        )

    def with_params(self, params: Params) -> ModelEncoders:
        """The same programs with other parameters, of which a locked tower's are the same."""
        if self.kept is None:
            return dataclasses.replace(self, params=params)
        kept = self.kept if self.image_is_locked else {}
        return dataclasses.replace(self, params=params, kept=kept, shared={})

    def once(self, key: tuple[Any, ...], compute: Callable[[], T], /) -> T:
        """What `compute` gives, computed once for these parameters and this key, if it may keep."""
        if self.shared is None:
            return compute()
        if key not in self.shared:
            self.shared[key] = compute()
        return self.shared[key]

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
        key = "features", source.fingerprint
        if key not in self.kept:
            self.kept[key] = self._pass(source)
        return self.kept[key]

    def texts(self, texts: Sequence[str], /) -> Rows:
        """Unit-norm text embeddings, in order."""
        return self._text_rows("text", texts)

    def text_features(self, texts: Sequence[str], /) -> Rows:
        """The text tower's pooled output, before the head, in order."""
        return self._text_rows("text_features", texts)

    def captions(
        self,
        source: Source,
        /,
        *,
        prefix: str = "",
        decoding: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> tuple[list[list[Written]], Bool[np.ndarray, " n"]]:
        """What the model writes of each image behind `prefix`, best first, in source order.

        `decoding` is what `decoding.build` takes; `seed` is for methods that draw. Nothing is
        written of an image that could not be read. Raises ValueError for a model without a decoder
        and for settings that it cannot follow.
        """
        prompt = np.array(self.tokenizer.prompt(prefix), np.int32)
        writer = Writer.build(
            self.model, self.tokenizer, prompt_length=len(prompt), settings=decoding or {}
        )
        if writer not in self.programs:
            self.programs[writer] = jax.jit(writer, out_shardings=self.partitioner.replicated)
        written: list[list[Written]] = []
        readable: list[np.ndarray] = []
        for i, (tokens, valid) in enumerate(self._image_tokens(source)):
            key = jax.random.fold_in(jax.random.key(seed), i)
            out = self.programs[writer](self.params, tokens, prompt, key)
            written += writer.read(out, self.tokenizer)
            readable.append(valid)
        valid = np.concatenate(readable)[: len(source)]
        return [own if ok else [] for own, ok in zip(written, valid, strict=False)], valid

    def caption_scores(
        self, source: Source, texts: Sequence[str], prefix: str = "", /
    ) -> CaptionScores | None:
        """How likely each image's text is, behind a prefix; None for a model without a decoder."""
        if self.model.decoder is None:
            return None
        ids, mask, targets = self.tokenizer.prompted([prefix] * len(texts), texts)
        size, rows, readable = self._batch_size, [], []
        for i, (tokens, valid) in enumerate(self._image_tokens(source)):
            part = [_padded(x[i * size : (i + 1) * size], size) for x in (ids, mask)]
            given = [tokens, *map(self.partitioner.put_global, part)]
            found = self.programs["caption_scores"](self.params, *given)
            rows.append(jax.device_get(found))
            readable.append(valid)
        n = len(texts)
        scores = jax.tree.map(lambda *parts: np.concatenate(parts)[:n], *rows)
        return CaptionScores(scores, mask, targets, np.concatenate(readable)[:n])

    def answer_scores(
        self, source: Source, texts: Sequence[str], /, *, prefix: str = "", normalise: bool = False
    ) -> tuple[Rows, Bool[np.ndarray, " n"]]:
        """log p of each text for each image behind `prefix`, in nats, a row for each image.

        A token, if `normalise`. Raises ValueError for a model without a decoder.
        """
        if self.model.decoder is None:
            raise ValueError("this model has no decoder, so it gives texts no likelihood")
        given = self.tokenizer.prompted([prefix] * len(texts), texts)
        length = int(given[1].sum(1).max())
        answers = tuple(x[:, :length] for x in given)
        name = "answers, normalised" if normalise else "answers"
        if name not in self.programs:
            self.programs[name] = jax.jit(
                functools.partial(_answers, self.model, normalise),
                out_shardings=self.partitioner.replicated,
            )
        rows, readable = [], []
        for tokens, valid in self._image_tokens(source):
            rows.append(np.asarray(self.programs[name](self.params, tokens, *answers)))
            readable.append(valid)
        n = len(source)
        return np.concatenate(rows)[:n], np.concatenate(readable)[:n]

    @property
    def _batch_size(self) -> int:
        n = self.partitioner.batch_devices
        return -(-BATCH_SIZE // n) * n

    def _pass(self, source: Source) -> tuple[Rows, Bool[np.ndarray, " n"]]:
        rows, valid = [], []
        for batch, readable in self._batches(source):
            rows.append(np.asarray(self.programs["features"](self.params, batch.image)))
            valid.append(readable)
        n = len(source)
        return np.concatenate(rows)[:n], np.concatenate(valid)[:n]

    def _image_tokens(self, source: Source) -> Iterator[tuple[jax.Array, np.ndarray]]:
        """Batches of what the decoder looks at, and which of their images could be read."""
        if self.kept is None:
            yield from self._new_tokens(source)
            return
        key, size, rows = ("tokens", source.fingerprint), self._batch_size, []
        if key in self.kept:
            tokens, readable = self.kept[key]
            for start in range(0, len(tokens), size):
                part = slice(start, start + size)
                yield self.partitioner.put_global(tokens[part]), readable[part]
            return
        for tokens, valid in self._new_tokens(source):
            if len(source) * (tokens.nbytes // len(tokens)) <= KEPT_TOKENS:
                whole = jax.device_put(tokens, self.partitioner.replicated)
                rows.append((np.asarray(whole), valid))
            yield tokens, valid
        if rows:
            tokens, readable = (np.concatenate(x) for x in zip(*rows, strict=True))
            self.kept[key] = tokens, readable

    def _new_tokens(self, source: Source) -> Iterator[tuple[jax.Array, np.ndarray]]:
        for batch, valid in self._batches(source):
            yield self.programs["tokens"](self.params, batch.image), valid

    def _batches(self, source: Source) -> Iterator[tuple[Batch, np.ndarray]]:
        """Batches of one size, on the devices, and on every host which rows could be read."""
        pipeline = data.Pipeline(
            source=source,
            transform=self.preprocess,
            batch_size=self._batch_size,
            host_index=jax.process_index(),
            host_count=jax.process_count(),
            max_bad_fraction=1.0,  # an evaluator reports what it could not read; it does not stop
        )
        for batch in pipeline.one_pass():
            placed = self.partitioner.put(batch)
            mask = jax.device_put(placed.example_mask, self.partitioner.replicated)
            yield placed, np.asarray(mask)

    def _text_rows(self, program: str, texts: Sequence[str]) -> Rows:
        """Run a program over texts, once for each that is not like an earlier one."""
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        return self._rows(program, self.tokenizer(list(place)))[[place[text] for text in texts]]

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


def _answers(
    model: models.Model,
    normalise: bool,
    params: Params,
    tokens: jax.Array,
    text: jax.Array,
    text_mask: jax.Array,
    target_mask: jax.Array,
) -> jax.Array:
    """As many answers at a time as keep their logits within ANSWER_LOGITS."""
    positions = min(model.decoder.chunk, text.shape[1])
    logits = 4 * len(tokens) * positions * model.decoder.vocab_size
    return decoding.answer_scores(
        lambda *given: model.caption_scores(params, *given).log_prob,
        tokens,
        text,
        text_mask,
        target_mask,
        normalise=normalise,
        block=max(1, ANSWER_LOGITS // logits),
    )


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    return np.pad(rows, [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1))
