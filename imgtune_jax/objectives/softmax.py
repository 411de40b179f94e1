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
    output_embeddings,
    pair_embeddings,
    pair_logits,
    safe_count,
)
from imgtune_jax.objectives.pairs import reduce_pairs
from imgtune_jax.types import Batch, Metrics, Outputs

# Finite, because a fully masked row must contribute 0 · finite; with -inf it would be 0 · nan.
MASKED_LOGIT = -1e30
NO_INDEX = 2**31 - 1


def softmax_loss(
    image_emb: Float[Array, "n d"],
    text_emb: Float[Array, "n d"],
    *,
    scale: Float[Array, ""] | float,
    positive_id: Int[Array, " n"] | None = None,
    mask: Bool[Array, " n"] | None = None,
    label_smoothing: float = 0.0,
    mesh: Mesh | None = None,
) -> Float[Array, ""]:
    """Return the softmax loss in nats per valid example (CLIP, 2103.00020, Figure 3).

        loss = 1/(2n) Σ_i [H(t_i, softmax_j(s_ij)) + H(t_i, softmax_j(s_ji))],  s = scale · x yᵀ

    H is the cross-entropy; i and j run over the n valid examples. The target t_i is uniform over
    the positives of i (UniCL, 2204.03610); without `positive_id`, it is one-hot at i. The loss of a
    batch without valid examples is 0.

    Args:
      image_emb: x, float32, of unit norm.
      text_emb: y, likewise; text i belongs to image i.
      scale: the multiplier itself, that is, after exp.
      positive_id: image i and text j are a positive pair if their ids are equal. Default: i = j.
      mask: False for rows to be ignored. Default: all rows are valid.
      label_smoothing: this share of t_i is uniform over all n examples (1512.00567).
      mesh: if given, the arrays are sharded by batch over it, and n must be a multiple of the
        number of shards. Default: all rows are on one device.

    Memory grows with n · d, not with n². The gradient (reverse mode only) is with respect to the
    embeddings and `scale`.
    """
    images, texts = pair_embeddings(image_emb, text_emb, positive_id=positive_id, mask=mask)
    sums: Any = _sum_and_hits(mesh, label_smoothing, jnp.float32(scale), images, texts)
    return sums[0] / safe_count(images.mask)


@dataclass(frozen=True)
class SoftmaxLoss:
    """`softmax_loss` as an objective: over the global batch, with the model's scale.

    The negatives of an example are all other valid examples of the *global* batch, independently of
    sharding and accumulation. The metrics are "softmax", in nats per valid example, and the recall
    at 1 within the batch, "batch_image_to_text_R@1" and "batch_text_to_image_R@1".
    """

    label_smoothing: float = 0.0
    positives: Positives = Positives.PAIR
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "positives", Positives(self.positives))
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"objective 'softmax': label_smoothing = {self.label_smoothing}; expected "
                "0 <= label_smoothing < 1"
            )

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        """Return (loss, metrics).

        Raises ValueError if the outputs lack an embedding, or if the model has a logit bias:
        weights that were trained with one belong to a sigmoid model.
        """
        if outputs.logit_bias is not None:
            raise ValueError(
                "objective 'softmax': the model has a logit_bias, which a softmax ignores; weights "
                "trained with one expect the 'sigmoid' objective; use that, or set "
                "config.model.logit_bias_init = None"
            )
        pairs = output_embeddings(outputs, batch, positives=self.positives, term="softmax")
        assert outputs.logit_scale is not None  # a model with embeddings has one
        sums: Any = _sum_and_hits(self.mesh, self.label_smoothing, outputs.logit_scale, *pairs)
        total, hits = sums
        count = jnp.sum(batch.example_mask, dtype=jnp.float32)
        metrics: Metrics = {
            "softmax": (total, count),
            "batch_image_to_text_R@1": (hits[0], count),
            "batch_text_to_image_R@1": (hits[1], count),
        }
        return total / jnp.maximum(count, 1), metrics


class LogitStats(NamedTuple):
    """Statistics of the logits of each image (or text), over the candidates reduced so far.

    log Σ exp(logit) is max + log(sum_exp). The two terms are stored apart: in float32, a single
    value near 100 would round the loss of a well-fitted row to a multiple of about 1e-5.
    """

    max: Float[Array, " n"]
    argmax: Int[Array, " n"]  # index of the best candidate; ties go to the lowest index
    sum_exp: Float[Array, " n"]  # Σ exp(logit - max)
    positive_sum: Float[Array, " n"]  # Σ logit over the positives

    @classmethod
    def empty(cls, n: int) -> LogitStats:
        """Return the statistics of n rows without candidates."""
        return cls(jnp.full(n, MASKED_LOGIT), jnp.full(n, NO_INDEX), jnp.zeros(n), jnp.zeros(n))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_and_hits(
    mesh: Mesh | None,
    label_smoothing: float,
    scale: Float[Array, ""],
    images: PairEmbeddings,
    texts: PairEmbeddings,
) -> tuple[Float[Array, ""], list[Float[Array, ""]]]:
    """Return (loss summed over examples, [number of images, of texts] ranked first by a positive).

    The loss of an example is the mean over both directions, in nats.
    """
    return _forward(mesh, label_smoothing, scale, images, texts)[0]


def _forward(
    mesh: Mesh | None,
    label_smoothing: float,
    scale: Float[Array, ""],
    images: PairEmbeddings,
    texts: PairEmbeddings,
) -> tuple[Any, Any]:
    empty = LogitStats.empty(images.positive_id.shape[0])
    stats = reduce_pairs(_block_stats, scale, (images, texts), (empty, empty), mesh=mesh)
    num_positives = _num_positives(images.positive_id, images.mask)
    total, hits = jnp.float32(0), []
    for query, candidate, s in ((images, texts, stats[0]), (texts, images, stats[1])):
        loss = jnp.log(s.sum_exp) + (1 - label_smoothing) * (s.max - s.positive_sum / num_positives)
        if label_smoothing:
            valid = candidate.mask.astype(jnp.float32)
            mean = matmul_float32(valid, candidate.emb) / safe_count(candidate.mask)
            loss += label_smoothing * (s.max - scale * matmul_float32(query.emb, mean))
        total += jnp.sum(jnp.where(query.mask, loss, 0.0)) / 2
        best_id = jnp.take(candidate.positive_id, s.argmax, mode="clip")
        hits.append(jnp.sum(query.mask & (query.positive_id == best_id), dtype=jnp.float32))
    return (total, hits), (scale, images, texts, stats, num_positives)


def _backward(mesh: Mesh | None, label_smoothing: float, residuals: Any, g: Any) -> tuple[Any, ...]:
    """Recompute the logits: storing them would take [b b] floats."""
    scale, images, texts, stats, num_positives = residuals
    mask = images.mask
    half_weights = [jnp.where(mask, 0.5 / s.sum_exp, 0.0) for s in stats]
    sides = (
        (images, stats[0].max, half_weights[0], (1 - label_smoothing) / num_positives),
        (texts, stats[1].max, half_weights[1]),
    )
    zeros = jnp.zeros_like(images.emb), jnp.zeros_like(texts.emb)
    scalars = scale, label_smoothing / safe_count(mask)
    d_image, d_text = reduce_pairs(_grad_block, scalars, sides, zeros, mesh=mesh)
    d_scale = g[0] * jnp.sum(images.emb * d_image)
    d_image, d_text = g[0] * scale * d_image, g[0] * scale * d_text
    return d_scale, cotangent_of(d_image), cotangent_of(d_text)


_sum_and_hits.defvjp(_forward, _backward)


def _block_stats(
    scale: Float[Array, ""],
    images: PairEmbeddings,
    texts: PairEmbeddings,
    image_stats: LogitStats,
    text_stats: LogitStats,
) -> tuple[LogitStats, LogitStats]:
    logits, valid, positive = pair_logits(images, texts, scale)
    logits = jnp.where(valid, logits, MASKED_LOGIT)
    image_stats = _update_stats(image_stats, logits, positive, texts.index[None, :], axis=1)
    return image_stats, _update_stats(text_stats, logits, positive, images.index[:, None], axis=0)


def _update_stats(
    stats: LogitStats,
    logits: Float[Array, "n m"],
    positive: Bool[Array, "n m"],
    index: Array,
    *,
    axis: int,
) -> LogitStats:
    """Add the candidates along `axis` to `stats`; `index` is their position in the batch."""
    block_max = logits.max(axis, keepdims=True)
    block_argmax = jnp.where(logits == block_max, index, NO_INDEX).min(axis)
    block_max = block_max.squeeze(axis)
    argmax = jnp.where(
        block_max == stats.max,
        jnp.minimum(block_argmax, stats.argmax),
        jnp.where(block_max > stats.max, block_argmax, stats.argmax),
    )
    new_max = jnp.maximum(block_max, stats.max)
    block_exp = jnp.exp(logits - jnp.expand_dims(new_max, axis))
    return LogitStats(
        max=new_max,
        argmax=argmax,
        sum_exp=stats.sum_exp * jnp.exp(stats.max - new_max) + block_exp.sum(axis),
        positive_sum=stats.positive_sum + jnp.where(positive, logits, 0.0).sum(axis),
    )


def _grad_block(
    scalars: Any, images: Any, texts: Any, d_image: Float[Array, "n d"], d_text: Float[Array, "m d"]
) -> tuple[Float[Array, "n d"], Float[Array, "m d"]]:
    """Add a block's gradients.

    The gradient with respect to a logit is the mean of both directions' probabilities, minus the
    target.
    """
    scale, uniform = scalars
    images, image_max, image_weight, target = images
    texts, text_max, text_weight = texts
    logits, valid, positive = pair_logits(images, texts, scale)
    logits = jnp.where(valid, logits, MASKED_LOGIT)
    d_logits = jnp.exp(logits - image_max[:, None]) * image_weight[:, None]
    d_logits += jnp.exp(logits - text_max[None, :]) * text_weight[None, :]
    d_logits -= jnp.where(positive, target[:, None], 0.0) + jnp.where(valid, uniform, 0.0)
    return d_image + matmul_float32(d_logits, texts.emb), d_text + matmul_float32(
        d_logits.T, images.emb
    )


def _num_positives(positive_id: Int[Array, " b"], mask: Bool[Array, " b"]) -> Float[Array, " b"]:
    """Return the number of valid examples with each row's id, itself included; at least 1."""
    b = positive_id.shape[0]
    _, group = jnp.unique(positive_id, return_inverse=True, size=b)
    return jnp.maximum(jax.ops.segment_sum(mask.astype(jnp.float32), group, b)[group], 1)
