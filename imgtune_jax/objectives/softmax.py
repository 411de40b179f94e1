"""Softmax contrastive loss (CLIP, 2103.00020)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.objectives.contrastive import (
    PairEmbeddings,
    Positives,
    cotangent_of,
    matmul_float32,
    pair_embeddings,
    pair_logits,
)
from imgtune_jax.objectives.pairs import reduce_pairs
from imgtune_jax.types import Batch, Metrics, Outputs

# Finite, not -inf: a wholly masked row must give 0 * finite, not 0 * nan.
MASKED_LOGIT = -1e30
NO_INDEX = 2**31 - 1


@dataclass(frozen=True)
class SoftmaxLoss:
    """Mean nats per valid example, averaged over image→text and text→image.

    The negatives of an example are all other valid examples of the *global* batch, however it is
    sharded or accumulated. With several positives the target is uniform over them.
    """

    label_smoothing: float = 0.0
    positives: Positives = Positives.PAIR
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "positives", Positives(self.positives))
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing = {self.label_smoothing}; wanted 0 <= it < 1")

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        """Raises ValueError when the model has a logit bias: such weights are a sigmoid model's."""
        if outputs.logit_bias is not None:
            raise ValueError(
                "softmax loss with a logit_bias: a softmax cannot see it, and weights trained with "
                "one are a sigmoid model's; use the 'sigmoid' objective or "
                "config.model.logit_bias_init=None"
            )
        pairs = pair_embeddings(outputs, batch, positives=self.positives, term="softmax")
        assert outputs.logit_scale is not None  # a model with embeddings has one
        of_pairs: Any = softmax_loss(self.mesh, self.label_smoothing, outputs.logit_scale, *pairs)
        total, hits = of_pairs
        count = jnp.sum(batch.example_mask, dtype=jnp.float32)
        metrics: Metrics = {
            "softmax": (total, count),
            "batch_image_to_text_R@1": (hits[0], count),
            "batch_text_to_image_R@1": (hits[1], count),
        }
        return total / jnp.maximum(count, 1), metrics


class LogitStats(NamedTuple):
    """What is known of each image's logits, or of each text's. log Σ exp is top + log(spread).

    The two stay apart: one float32 of about 100 would round a well-fitted row's nats to 1e-5.
    """

    max: Float[Array, " n"]
    argmax: Int[Array, " n"]  # index of the candidate at the top; of equal ones the first
    sum_exp: Float[Array, " n"]  # Σ exp(logit - top)
    positive_sum: Float[Array, " n"]  # Σ logit, over the positives

    @classmethod
    def nothing(cls, n: int) -> LogitStats:
        """Before the first block."""
        return cls(jnp.full(n, MASKED_LOGIT), jnp.full(n, NO_INDEX), jnp.zeros(n), jnp.zeros(n))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def softmax_loss(
    mesh: Mesh | None,
    smoothing: float,
    scale: Float[Array, ""],
    images: PairEmbeddings,
    texts: PairEmbeddings,
) -> tuple[Float[Array, ""], list[Float[Array, ""]]]:
    """(half the nats of all images and texts, [images, texts] that a positive is best for)."""
    return _nats_and_residuals(mesh, smoothing, scale, images, texts)[0]


def _nats_and_residuals(
    mesh: Mesh | None,
    smoothing: float,
    scale: Float[Array, ""],
    images: PairEmbeddings,
    texts: PairEmbeddings,
) -> tuple[Any, Any]:
    nothing = LogitStats.nothing(images.positive_id.shape[0])
    seen = reduce_pairs(_block_stats, scale, (images, texts), (nothing, nothing), mesh=mesh)
    num_right = _num_positives(images.positive_id, images.mask)
    total, hits = jnp.float32(0), []
    for own, other, s in ((images, texts, seen[0]), (texts, images, seen[1])):
        nats = jnp.log(s.spread) + (1 - smoothing) * (s.top - s.right / num_right)
        if smoothing:
            mean = matmul_float32(other.mask.astype(jnp.float32), other.emb) / _safe_count(
                other.mask
            )
            nats += smoothing * (s.top - scale * matmul_float32(own.emb, mean))
        total += jnp.sum(jnp.where(own.mask, nats, 0.0)) / 2
        hit = own.mask & (own.positive_id == jnp.take(other.positive_id, s.first, mode="clip"))
        hits.append(jnp.sum(hit, dtype=jnp.float32))
    return (total, hits), (scale, images, texts, seen, num_right)


def _pull_back(mesh: Mesh | None, smoothing: float, residuals: Any, g: Any) -> tuple[Any, ...]:
    """Σ slope · emb, from the pairs' logits once more: keeping them would take [b b] floats."""
    scale, images, texts, seen, num_right = residuals
    valid = images.valid
    halves = [jnp.where(valid, 0.5 / s.spread, 0.0) for s in seen]
    pairs = (
        (images, seen[0].top, halves[0], (1 - smoothing) / num_right),
        (texts, seen[1].top, halves[1]),
    )
    zeros = jnp.zeros_like(images.emb), jnp.zeros_like(texts.emb)
    scalars = scale, smoothing / _safe_count(valid)
    d_image, d_text = reduce_pairs(_grad_block, scalars, pairs, zeros, mesh=mesh)
    d_scale = g[0] * jnp.sum(images.emb * d_image)
    d_image, d_text = g[0] * scale * d_image, g[0] * scale * d_text
    return d_scale, cotangent_of(d_image), cotangent_of(d_text)


softmax_loss.defvjp(_nats_and_residuals, _pull_back)


def _block_stats(
    scale: Float[Array, ""],
    images: PairEmbeddings,
    texts: PairEmbeddings,
    of_images: LogitStats,
    of_texts: LogitStats,
) -> tuple[LogitStats, LogitStats]:
    logits, valid, positive = pair_logits(images, texts, scale)
    logits = jnp.where(valid, logits, MASKED_LOGIT)
    of_images = _update_stats(of_images, logits, positive, texts.index[None, :], axis=1)
    return of_images, _update_stats(of_texts, logits, positive, images.index[:, None], axis=0)


def _update_stats(
    seen: LogitStats,
    logits: Float[Array, "n m"],
    positive: Bool[Array, "n m"],
    index: Array,
    *,
    axis: int,
) -> LogitStats:
    """`seen`, with the candidates along `axis`; `index` is theirs in the batch."""
    highest = logits.max(axis, keepdims=True)
    first = jnp.where(logits == highest, index, NO_INDEX).min(axis)
    highest = highest.squeeze(axis)
    earlier = jnp.minimum(first, seen.argmax)
    first = jnp.where(
        highest == seen.max, earlier, jnp.where(highest > seen.max, first, seen.argmax)
    )
    top = jnp.maximum(highest, seen.max)
    exps = jnp.exp(logits - jnp.expand_dims(top, axis))
    spread = seen.sum_exp * jnp.exp(seen.max - top) + exps.sum(axis)
    return LogitStats(
        top, first, spread, seen.positive_sum + jnp.where(positive, logits, 0.0).sum(axis)
    )


def _grad_block(
    scalars: Any, images: Any, texts: Any, d_image: Float[Array, "n d"], d_text: Float[Array, "m d"]
) -> tuple[Float[Array, "n d"], Float[Array, "m d"]]:
    """The slope of the loss by a logit: both ways' probabilities halved, less the target."""
    scale, uniform = scalars
    images, image_top, image_half, target = images
    texts, text_top, text_half = texts
    logits, valid, positive = pair_logits(images, texts, scale)
    logits = jnp.where(valid, logits, MASKED_LOGIT)
    d_logits = jnp.exp(logits - image_top[:, None]) * image_half[:, None]
    d_logits += jnp.exp(logits - text_top[None, :]) * text_half[None, :]
    d_logits -= jnp.where(positive, target[:, None], 0.0) + jnp.where(valid, uniform, 0.0)
    return d_image + matmul_float32(d_logits, texts.emb), d_text + matmul_float32(
        d_logits.T, images.emb
    )


def _num_positives(key: Int[Array, " b"], valid: Bool[Array, " b"]) -> Float[Array, " b"]:
    """How many valid examples have a row's key, itself included; at least 1."""
    b = key.shape[0]
    _, group = jnp.unique(key, return_inverse=True, size=b)
    return jnp.maximum(jax.ops.segment_sum(valid.astype(jnp.float32), group, b)[group], 1)


def _safe_count(valid: Bool[Array, " b"]) -> Float[Array, ""]:
    return jnp.maximum(valid.sum(dtype=jnp.float32), 1)
