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
from imgtune_jax.evals.captioner import Captioner
from imgtune_jax.evals.protocol import CaptionScores, GeneratedCaption, Source, T
from imgtune_jax.partition import Partitioner
from imgtune_jax.types import Batch, Params

BATCH_SIZE = 128
MAX_LOGITS_BYTES = 1 << 28  # bytes, over all devices
MAX_MEMO_BYTES = 1 << 30  # bytes; a source with more image tokens has them computed anew
EmbeddingRows = Float[np.ndarray, "n d"]


@dataclass(frozen=True)
class ModelPredictor:
    """Encodes in fixed-size, sharded batches; the padding of the last one never comes out.

    What the image side gives of a source is computed once and kept in `kept` (None: not kept). It
    outlives a change of parameters when the image side is wholly locked, so judging again during
    training costs the head or the decoder alone. What evaluators share through `once` does not.
    """

    model: models.ImageTextModel
    params: Params
    preprocess: data.Compose
    tokenizer: data.Tokenizer
    partitioner: Partitioner
    image_is_locked: bool
    compiled_fns: dict[Any, Callable[..., Any]]
    feature_memo: dict[tuple[str, str], tuple[np.ndarray, Bool[np.ndarray, " n"]]] | None
    memo: dict[tuple[Any, ...], Any] | None

    @classmethod
    def build(
        cls,
        model: models.ImageTextModel,
        params: Params,
        *,
        preprocess: data.Compose,
        tokenizer: data.Tokenizer,
        partitioner: Partitioner,
        image_is_locked: bool,
        use_memo: bool,
    ) -> ModelPredictor:
        """Compile lazily, once for all parameters that come later through `with_params`."""
        functions = {
            "head": model.project_image_features,
            "features": model.image_features,
            "text": model.encode_text,
            "text_features": model.text_features,
        }
        if model.decoder is not None:
            functions["caption_scores"] = model.caption_scores
        programs: dict[Any, Callable[..., Any]] = {
            name: jax.jit(f, out_shardings=partitioner.replicated) for name, f in functions.items()
        }
        programs["tokens"] = jax.jit(model.image_tokens, out_shardings=partitioner.batch_sharding)
        return cls(
            model,
            params,
            preprocess,
            tokenizer,
            partitioner,
            image_is_locked,
            programs,
            feature_memo={} if use_memo else None,
            memo={} if use_memo else None,
        )

    def with_params(self, params: Params) -> ModelPredictor:
        """The same programs with other parameters, of which a locked tower's are the same."""
        if self.feature_memo is None:
            return dataclasses.replace(self, params=params)
        kept = self.feature_memo if self.image_is_locked else {}
        return dataclasses.replace(self, params=params, feature_memo=kept, memo={})

    def memoize(self, key: tuple[Any, ...], compute: Callable[[], T], /) -> T:
        """What `compute` gives, computed once for these parameters and this key, if it may keep."""
        if self.memo is None:
            return compute()
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    @property
    def logit_scale(self) -> float | None:
        """The multiplier of cosine similarities, after exp; None for a mere captioner."""
        scale = self.model.logit_scale(self.params)
        return None if scale is None else float(scale)

    @property
    def logit_bias(self) -> float | None:
        """What is added to the scaled similarities; None for a model that has none."""
        return float(self.params["logit_bias"]) if "logit_bias" in self.params else None

    def embed_images(self, source: Source, /) -> tuple[EmbeddingRows, Bool[np.ndarray, " n"]]:
        """Unit-norm image embeddings in source order; False marks images that could not be read."""
        features, valid = self.image_features(source)
        return self._run_batched("head", (features,)), valid

    def image_features(self, source: Source, /) -> tuple[EmbeddingRows, Bool[np.ndarray, " n"]]:
        """The image tower's pooled output, before the head, in source order."""
        if self.feature_memo is None:
            return self._compute_image_features(source)
        key = "features", source.fingerprint
        if key not in self.feature_memo:
            self.feature_memo[key] = self._compute_image_features(source)
        return self.feature_memo[key]

    def embed_texts(self, texts: Sequence[str], /) -> EmbeddingRows:
        """Unit-norm text embeddings, in order."""
        return self._run_on_texts("text", texts)

    def text_features(self, texts: Sequence[str], /) -> EmbeddingRows:
        """The text tower's pooled output, before the head, in order."""
        return self._run_on_texts("text_features", texts)

    def generate_captions(
        self,
        source: Source,
        /,
        *,
        prefix: str = "",
        decoding: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> tuple[list[list[GeneratedCaption]], Bool[np.ndarray, " n"]]:
        """What the model writes of each image behind `prefix`, best first, in source order.

        `decoding` is what `decoding.build` takes; `seed` is for methods that draw. Nothing is
        written of an image that could not be read. Raises ValueError for a model without a decoder
        and for settings that it cannot follow.
        """
        prompt = np.array(self.tokenizer.prompt_ids(prefix), np.int32)
        writer = Captioner.build(
            self.model, self.tokenizer, prompt_length=len(prompt), settings=decoding or {}
        )
        if writer not in self.compiled_fns:
            self.compiled_fns[writer] = jax.jit(writer, out_shardings=self.partitioner.replicated)
        written: list[list[GeneratedCaption]] = []
        readable: list[np.ndarray] = []
        for i, (tokens, valid) in enumerate(self._image_tokens(source)):
            key = jax.random.fold_in(jax.random.key(seed), i)
            out = self.compiled_fns[writer](self.params, tokens, prompt, key)
            written += writer.to_captions(out, self.tokenizer)
            readable.append(valid)
        valid = np.concatenate(readable)[: len(source)]
        return [own if ok else [] for own, ok in zip(written, valid, strict=False)], valid

    def caption_scores(
        self, source: Source, texts: Sequence[str], prefix: str = "", /
    ) -> CaptionScores | None:
        """How likely each image's text is, behind a prefix; None for a model without a decoder."""
        if self.model.decoder is None:
            return None
        ids, mask, targets = self.tokenizer.encode_with_prefix([prefix] * len(texts), texts)
        size, rows, readable = self._batch_size, [], []
        for i, (tokens, valid) in enumerate(self._image_tokens(source)):
            part = [_pad_rows(x[i * size : (i + 1) * size], size) for x in (ids, mask)]
            given = [tokens, *map(self.partitioner.shard_rows, part)]
            found = self.compiled_fns["caption_scores"](self.params, *given)
            rows.append(jax.device_get(found))
            readable.append(valid)
        n = len(texts)
        scores = jax.tree.map(lambda *parts: np.concatenate(parts)[:n], *rows)
        return CaptionScores(scores, mask, targets, np.concatenate(readable)[:n])

    def score_texts(
        self,
        source: Source,
        texts: Sequence[str],
        /,
        *,
        prefix: str = "",
        normalize_length: bool = False,
    ) -> tuple[EmbeddingRows, Bool[np.ndarray, " n"]]:
        """log p of each text for each image behind `prefix`, in nats, a row for each image.

        A token, if `normalize_length`. Raises ValueError for a model without a decoder.
        """
        if self.model.decoder is None:
            raise ValueError("this model has no decoder, so it gives texts no likelihood")
        given = self.tokenizer.encode_with_prefix([prefix] * len(texts), texts)
        length = int(given[1].sum(1).max())
        answers = tuple(x[:, :length] for x in given)
        name = "answers, length-normalized" if normalize_length else "answers"
        if name not in self.compiled_fns:
            self.compiled_fns[name] = jax.jit(
                functools.partial(_score_texts, self.model, normalize_length),
                out_shardings=self.partitioner.replicated,
            )
        rows, readable = [], []
        for tokens, valid in self._image_tokens(source):
            rows.append(np.asarray(self.compiled_fns[name](self.params, tokens, *answers)))
            readable.append(valid)
        n = len(source)
        return np.concatenate(rows)[:n], np.concatenate(readable)[:n]

    @property
    def _batch_size(self) -> int:
        n = self.partitioner.num_batch_shards
        return -(-BATCH_SIZE // n) * n

    def _compute_image_features(
        self, source: Source
    ) -> tuple[EmbeddingRows, Bool[np.ndarray, " n"]]:
        rows, valid = [], []
        for batch, readable in self._batches(source):
            rows.append(np.asarray(self.compiled_fns["features"](self.params, batch.image)))
            valid.append(readable)
        n = len(source)
        return np.concatenate(rows)[:n], np.concatenate(valid)[:n]

    def _image_tokens(self, source: Source) -> Iterator[tuple[jax.Array, np.ndarray]]:
        """Batches of what the decoder looks at, and which of their images could be read."""
        if self.feature_memo is None:
            yield from self._compute_image_tokens(source)
            return
        key, size, rows = ("tokens", source.fingerprint), self._batch_size, []
        if key in self.feature_memo:
            tokens, readable = self.feature_memo[key]
            for start in range(0, len(tokens), size):
                part = slice(start, start + size)
                yield self.partitioner.shard_rows(tokens[part]), readable[part]
            return
        for tokens, valid in self._compute_image_tokens(source):
            if len(source) * (tokens.nbytes // len(tokens)) <= MAX_MEMO_BYTES:
                whole = jax.device_put(tokens, self.partitioner.replicated)
                rows.append((np.asarray(whole), valid))
            yield tokens, valid
        if rows:
            tokens, readable = (np.concatenate(x) for x in zip(*rows, strict=True))
            self.feature_memo[key] = tokens, readable

    def _compute_image_tokens(self, source: Source) -> Iterator[tuple[jax.Array, np.ndarray]]:
        for batch, valid in self._batches(source):
            yield self.compiled_fns["tokens"](self.params, batch.image), valid

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
            placed = self.partitioner.put_batch(batch)
            mask = jax.device_put(placed.example_mask, self.partitioner.replicated)
            yield placed, np.asarray(mask)

    def _run_on_texts(self, program: str, texts: Sequence[str]) -> EmbeddingRows:
        """Run a program over texts, once for each that is not like an earlier one."""
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        return self._run_batched(program, self.tokenizer(list(place)))[
            [place[text] for text in texts]
        ]

    def _run_batched(self, program: str, arrays: tuple[np.ndarray, ...]) -> EmbeddingRows:
        """Run a program over rows that every host holds, padded to whole batches."""
        n, size = len(arrays[0]), self._batch_size
        out = []
        for start in range(0, n, size):
            part = [a[start : start + size] for a in arrays]
            placed = [self.partitioner.shard_rows(_pad_rows(a, size)) for a in part]
            out.append(np.asarray(self.compiled_fns[program](self.params, *placed))[: len(part[0])])
        if not out:
            raise ValueError("nothing to encode: got an empty list")
        return np.concatenate(out)


def _score_texts(
    model: models.ImageTextModel,
    normalize_length: bool,
    params: Params,
    tokens: jax.Array,
    text: jax.Array,
    text_mask: jax.Array,
    target_mask: jax.Array,
) -> jax.Array:
    """As many answers at a time as keep their logits within ANSWER_LOGITS."""
    positions = min(model.decoder.chunk, text.shape[1])
    logits = 4 * len(tokens) * positions * model.decoder.vocab_size
    return decoding.score_texts(
        lambda *given: model.caption_scores(params, *given).log_prob,
        tokens,
        text,
        text_mask,
        target_mask,
        normalize_length=normalize_length,
        block=max(1, MAX_LOGITS_BYTES // logits),
    )


def _pad_rows(rows: np.ndarray, size: int) -> np.ndarray:
    return np.pad(rows, [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1))
