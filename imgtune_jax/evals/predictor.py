"""A trained model as evaluators and users call it: images and texts in, NumPy arrays out."""

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
from imgtune_jax.errors import UserError
from imgtune_jax.evals.captioner import Captioner
from imgtune_jax.evals.protocol import CaptionScores, GeneratedCaption, Source, T
from imgtune_jax.partition import Partitioner
from imgtune_jax.types import Batch, Params

BATCH_SIZE = 128  # rounded up to a multiple of the number of batch shards
MAX_LOGITS_BYTES = 1 << 28  # of one block of texts to score, over all devices
MAX_MEMO_BYTES = 1 << 30  # of a source's image tokens; larger sources are encoded on each use
EmbeddingRows = Float[np.ndarray, "n d"]


@dataclass(frozen=True)
class ModelPredictor:
    """Runs a model in sharded batches of one size and drops the rows that pad the last batch.

    Two dicts avoid repeated work; both are None if memoization is disabled. `feature_memo` has the
    image features and image tokens of each source. If the image tower and its pooler are frozen
    (`image_side_is_frozen`), these stay valid when the parameters change, and an evaluation during
    training runs only the head or the decoder. `memo` has the values that evaluators share through
    `memoize`. It is cleared when the parameters change.
    """

    model: models.ImageTextModel
    params: Params
    preprocess: data.Compose
    tokenizer: data.Tokenizer
    partitioner: Partitioner
    image_side_is_frozen: bool
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
        image_side_is_frozen: bool,
        use_memo: bool,
    ) -> ModelPredictor:
        """Create a predictor. Functions compile on first use; `with_params` reuses them."""
        functions = {
            "head": model.project_image_features,
            "features": model.image_features,
            "text": model.encode_text,
            "text_features": model.text_features,
        }
        if model.decoder is not None:
            functions["caption_scores"] = model.caption_scores
        compiled_fns: dict[Any, Callable[..., Any]] = {
            name: jax.jit(f, out_shardings=partitioner.replicated) for name, f in functions.items()
        }
        compiled_fns["tokens"] = jax.jit(
            model.image_tokens, out_shardings=partitioner.batch_sharding
        )
        return cls(
            model,
            params,
            preprocess,
            tokenizer,
            partitioner,
            image_side_is_frozen,
            compiled_fns,
            feature_memo={} if use_memo else None,
            memo={} if use_memo else None,
        )

    def with_params(self, params: Params) -> ModelPredictor:
        """Return a predictor with other parameters and the same compiled functions.

        If `image_side_is_frozen`, the parameters of image tower and pooler must be the same.
        """
        if self.feature_memo is None:
            return dataclasses.replace(self, params=params)
        feature_memo = self.feature_memo if self.image_side_is_frozen else {}
        return dataclasses.replace(self, params=params, feature_memo=feature_memo, memo={})

    def memoize(self, key: tuple[Any, ...], compute: Callable[[], T], /) -> T:
        """Return `compute()`; with a memo, compute it once per `key` and set of parameters."""
        if self.memo is None:
            return compute()
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    @property
    def logit_scale(self) -> float | None:
        """The factor of cosine similarities (after exp); None for a captioner-only model."""
        scale = self.model.logit_scale(self.params)
        return None if scale is None else float(scale)

    @property
    def logit_bias(self) -> float | None:
        """The constant added to the scaled similarities; None for a model without one."""
        return float(self.params["logit_bias"]) if "logit_bias" in self.params else None

    def embed_images(self, source: Source, /) -> tuple[EmbeddingRows, Bool[np.ndarray, " n"]]:
        """Return unit-norm image embeddings, and the mask of readable images."""
        self._check_has_embeddings()
        features, valid = self.image_features(source)
        return self._run_batched("head", (features,)), valid

    def image_features(self, source: Source, /) -> tuple[EmbeddingRows, Bool[np.ndarray, " n"]]:
        """Return pooled image features, before the head, and the mask of readable images."""
        if self.feature_memo is None:
            return self._compute_image_features(source)
        key = "features", source.fingerprint
        if key not in self.feature_memo:
            self.feature_memo[key] = self._compute_image_features(source)
        return self.feature_memo[key]

    def embed_texts(self, texts: Sequence[str], prefix: str = "", /) -> EmbeddingRows:
        """Return unit-norm embeddings of the texts, each after `prefix`, in order."""
        self._check_has_embeddings()
        return self._run_on_texts("text", texts, prefix)

    def text_features(self, texts: Sequence[str], /) -> EmbeddingRows:
        """Return the text tower's pooled output, before the head, in order."""
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
        """Return captions generated after `prefix` for each image, and the mask of readable images.

        `decoding` has the settings that `decoding.build_generation_config` takes; None is greedy
        decoding. Only sampling uses `seed`. An unreadable image has an empty list. Raises
        UserError for a model without a decoder and for settings that the model does not support.
        """
        prompt = np.array(self.tokenizer.prompt_ids(prefix), np.int32)
        captioner = Captioner.build(
            self.model, self.tokenizer, prompt_length=len(prompt), settings=decoding or {}
        )
        if captioner not in self.compiled_fns:
            self.compiled_fns[captioner] = jax.jit(
                captioner, out_shardings=self.partitioner.replicated
            )
        captions: list[list[GeneratedCaption]] = []
        masks: list[np.ndarray] = []
        for i, (tokens, batch_mask) in enumerate(self._image_tokens(source)):
            key = jax.random.fold_in(jax.random.key(seed), i)
            generated = self.compiled_fns[captioner](self.params, tokens, prompt, key)
            captions += captioner.to_captions(generated, self.tokenizer)
            masks.append(batch_mask)
        valid = np.concatenate(masks)[: len(source)]
        return [row if ok else [] for row, ok in zip(captions, valid, strict=False)], valid

    def caption_scores(
        self, source: Source, texts: Sequence[str], prefix: str = "", /
    ) -> CaptionScores | None:
        """Score texts[i], after `prefix`, as the caption of image i; None without a decoder."""
        if self.model.decoder is None:
            return None
        ids, mask, targets = self.tokenizer.encode_with_prefix([prefix] * len(texts), texts)
        size, batch_scores, masks = self._batch_size, [], []
        for i, (tokens, batch_mask) in enumerate(self._image_tokens(source)):
            text = [_pad_rows(x[i * size : (i + 1) * size], size) for x in (ids, mask)]
            scores = self.compiled_fns["caption_scores"](
                self.params, tokens, *map(self.partitioner.shard_rows, text)
            )
            batch_scores.append(jax.device_get(scores))
            masks.append(batch_mask)
        n = len(texts)
        scores = jax.tree.map(lambda *arrays: np.concatenate(arrays)[:n], *batch_scores)
        return CaptionScores(scores, mask, targets, np.concatenate(masks)[:n])

    def score_texts(
        self,
        source: Source,
        texts: Sequence[str],
        /,
        *,
        prefix: str = "",
        normalize_length: bool = False,
    ) -> tuple[EmbeddingRows, Bool[np.ndarray, " n"]]:
        """Return log p(text | image, prefix) in nats [n m], and the mask of readable images.

        With `normalize_length`, each log probability is divided by the text's number of tokens.
        Raises UserError for a model without a decoder.
        """
        if self.model.decoder is None:
            raise UserError(
                "this model has no decoder, so it cannot score texts; train one with "
                "config.model.decoder"
            )
        ids, mask, targets = self.tokenizer.encode_with_prefix([prefix] * len(texts), texts)
        longest = int(mask.sum(1).max())
        encoded = tuple(x[:, :longest] for x in (ids, mask, targets))
        name = "score_texts, length-normalized" if normalize_length else "score_texts"
        if name not in self.compiled_fns:
            self.compiled_fns[name] = jax.jit(
                functools.partial(_score_texts, self.model, normalize_length),
                out_shardings=self.partitioner.replicated,
            )
        scores, masks = [], []
        for tokens, batch_mask in self._image_tokens(source):
            scores.append(np.asarray(self.compiled_fns[name](self.params, tokens, *encoded)))
            masks.append(batch_mask)
        n = len(source)
        return np.concatenate(scores)[:n], np.concatenate(masks)[:n]

    def _check_has_embeddings(self) -> None:
        if self.model.text is None:
            raise UserError(
                "this model has no text tower, so it has no embeddings of images and texts; use "
                "one that was trained with config.model.text"
            )

    @property
    def _batch_size(self) -> int:
        n = self.partitioner.num_batch_shards
        return -(-BATCH_SIZE // n) * n

    def _compute_image_features(
        self, source: Source
    ) -> tuple[EmbeddingRows, Bool[np.ndarray, " n"]]:
        features, masks = [], []
        for batch, batch_mask in self._batches(source):
            features.append(np.asarray(self.compiled_fns["features"](self.params, batch.image)))
            masks.append(batch_mask)
        n = len(source)
        return np.concatenate(features)[:n], np.concatenate(masks)[:n]

    def _image_tokens(self, source: Source) -> Iterator[tuple[jax.Array, np.ndarray]]:
        """Yield, per batch, the image tokens for the decoder and the mask of readable images."""
        if self.feature_memo is None:
            yield from self._compute_image_tokens(source)
            return
        key, size, computed = ("tokens", source.fingerprint), self._batch_size, []
        if key in self.feature_memo:
            tokens, mask = self.feature_memo[key]
            for start in range(0, len(tokens), size):
                rows = slice(start, start + size)
                yield self.partitioner.shard_rows(tokens[rows]), mask[rows]
            return
        for tokens, mask in self._compute_image_tokens(source):
            if len(source) * (tokens.nbytes // len(tokens)) <= MAX_MEMO_BYTES:
                replicated = jax.device_put(tokens, self.partitioner.replicated)
                computed.append((np.asarray(replicated), mask))
            yield tokens, mask
        if computed:
            tokens, mask = (np.concatenate(x) for x in zip(*computed, strict=True))
            self.feature_memo[key] = tokens, mask

    def _compute_image_tokens(self, source: Source) -> Iterator[tuple[jax.Array, np.ndarray]]:
        for batch, mask in self._batches(source):
            yield self.compiled_fns["tokens"](self.params, batch.image), mask

    def _batches(self, source: Source) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yield sharded batches of one size, each with the mask of all its rows, on every host."""
        pipeline = data.Pipeline(
            source=source,
            transform=self.preprocess,
            batch_size=self._batch_size,
            rows=self.partitioner.host_rows(self._batch_size),
            max_bad_fraction=1.0,  # unreadable images are masked; they do not stop an evaluation
        )
        for host_batch in pipeline.one_pass():
            batch = self.partitioner.put_batch(host_batch)
            mask = jax.device_put(batch.example_mask, self.partitioner.replicated)
            yield batch, np.asarray(mask)

    def _run_on_texts(self, name: str, texts: Sequence[str], prefix: str = "") -> EmbeddingRows:
        """Run a compiled function once per distinct text; return one row per text."""
        row_of = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        ids, mask, _ = self.tokenizer.encode_with_prefix([prefix] * len(row_of), list(row_of))
        rows = self._run_batched(name, (ids, mask))
        return rows[[row_of[text] for text in texts]]

    def _run_batched(self, name: str, arrays: tuple[np.ndarray, ...]) -> EmbeddingRows:
        """Run a compiled function on arrays that all hosts have, in batches padded to one size."""
        n, size = len(arrays[0]), self._batch_size
        outputs = []
        for start in range(0, n, size):
            rows = [a[start : start + size] for a in arrays]
            batch = [self.partitioner.shard_rows(_pad_rows(a, size)) for a in rows]
            output = np.asarray(self.compiled_fns[name](self.params, *batch))
            outputs.append(output[: len(rows[0])])
        if not outputs:
            raise UserError("got an empty list of inputs; expected at least one image or text")
        return np.concatenate(outputs)


def _score_texts(
    model: models.ImageTextModel,
    normalize_length: bool,
    params: Params,
    tokens: jax.Array,
    text: jax.Array,
    text_mask: jax.Array,
    target_mask: jax.Array,
) -> jax.Array:
    """Score every text for every image, in blocks whose logits fit in MAX_LOGITS_BYTES."""
    positions = min(model.decoder.chunk, text.shape[1])
    bytes_per_text = 4 * len(tokens) * positions * model.decoder.vocab_size
    return decoding.score_texts(
        lambda *inputs: model.caption_scores(params, *inputs).log_prob,
        tokens,
        text,
        text_mask,
        target_mask,
        normalize_length=normalize_length,
        block=max(1, MAX_LOGITS_BYTES // bytes_per_text),
    )


def _pad_rows(rows: np.ndarray, size: int) -> np.ndarray:
    return np.pad(rows, [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1))
