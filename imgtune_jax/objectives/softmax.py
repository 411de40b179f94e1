"""Softmax contrastive loss (CLIP, 2103.00020).

Axis letters: n images, m texts (or n of both), d width of the embeddings.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.errors import UserError
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

# Finite: with -inf, the probabilities of a fully masked row would be NaN, also after
# multiplication by 0.
MASKED_LOGIT = -1e30
NO_INDEX = 2**31 - 1  # larger than every index, so that it never is the minimum


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

    H is the cross-entropy, and i and j run over the n valid examples. The target t_i is uniform
    over the positives of i (UniCL, 2204.03610). Without `positive_id`, t_i is one-hot at i. The
    loss of a batch without valid examples is 0.

    Args:
      image_emb: x, float32, of unit norm.
      text_emb: y, float32, of unit norm. Text i belongs to image i.
      scale: the factor that multiplies the similarities, not its logarithm.
      positive_id: image i and text j are a positive pair if their ids are equal. Default: i = j.
      mask: False for rows to ignore. Default: all rows are valid.
      label_smoothing: the fraction of t_i that is uniform over the n valid examples (1512.00567).
      mesh: the device mesh that shards the rows, whose number must be a multiple of the number of
        shards. Default: all rows are on one device.

    Memory grows linearly with the number of rows, not with its square. The embeddings and `scale`
    have gradients, in reverse mode only.
    """
    images, texts = pair_embeddings(image_emb, text_emb, positive_id=positive_id, mask=mask)
    sums: Any = _sum_and_hits(mesh, label_smoothing, jnp.float32(scale), images, texts)
    return sums[0] / safe_count(images.mask)


@dataclass(frozen=True)
class SoftmaxLoss:
    """`softmax_loss` as an objective: over the global batch, with the model's scale.

    Each image is compared with all valid texts of the global batch, and each text with all valid
    images, independently of sharding and accumulation. The metrics are "softmax" (the loss, in nats
    per valid example) and the recall at 1 within the batch, "batch_image_to_text_R@1" and
    "batch_text_to_image_R@1".
    """

    label_smoothing: float = 0.0
    positives: Positives = Positives.PAIR
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "positives", Positives(self.positives))
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"objective 'softmax': label_smoothing = {self.label_smoothing}; expected "
                "0 <= label_smoothing < 1"
            )

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        """Return (loss, metrics).

        Raises UserError if the outputs lack an embedding, or if the model has a logit bias. A bias
        is a parameter of models that were trained with the sigmoid loss.
        """
        if outputs.logit_bias is not None:
            raise UserError(
                "objective 'softmax': the model has a logit_bias, which the softmax loss ignores; "
                "use the 'sigmoid' objective if the weights were trained with a bias, or else set "
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
    """Running statistics of the logits of n images over the texts, or of n texts over the images.

    log Σ exp(logit) is max + log(sum_exp). The two terms are stored separately because their sum
    can be near 100, where float32 rounds to multiples of about 1e-5. Small losses would be lost.
    """

    max: Float[Array, " n"]
    argmax: Int[Array, " n"]  # index of the highest logit; ties go to the lowest index
    sum_exp: Float[Array, " n"]  # Σ exp(logit - max)
    positive_sum: Float[Array, " n"]  # Σ logit over the positives

    @classmethod
    def empty(cls, n: int) -> LogitStats:
        """Return the initial statistics, over no logits."""
        return cls(jnp.full(n, MASKED_LOGIT), jnp.full(n, NO_INDEX), jnp.zeros(n), jnp.zeros(n))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_and_hits(
    mesh: Mesh | None,
    label_smoothing: float,
    scale: Float[Array, ""],
    images: PairEmbeddings,
    texts: PairEmbeddings,
) -> tuple[Float[Array, ""], list[Float[Array, ""]]]:
    """Return (loss summed over the valid examples, [image hits, text hits]).

    The loss of an example is the mean over both directions, in nats. Image hits is the number of
    images whose highest logit belongs to a positive text. Text hits is the number of texts whose
    highest logit belongs to a positive image.
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
    for query, candidate, query_stats in ((images, texts, stats[0]), (texts, images, stats[1])):
        loss = jnp.log(query_stats.sum_exp) + (1 - label_smoothing) * (
            query_stats.max - query_stats.positive_sum / num_positives
        )
        if label_smoothing:
            valid = candidate.mask.astype(jnp.float32)
            mean_emb = matmul_float32(valid, candidate.emb) / safe_count(candidate.mask)
            mean_logit = scale * matmul_float32(query.emb, mean_emb)
            loss += label_smoothing * (query_stats.max - mean_logit)
        total += jnp.sum(jnp.where(query.mask, loss, 0.0)) / 2
        best_id = jnp.take(candidate.positive_id, query_stats.argmax, mode="clip")
        hits.append(jnp.sum(query.mask & (query.positive_id == best_id), dtype=jnp.float32))
    return (total, hits), (scale, images, texts, stats, num_positives)


def _backward(
    mesh: Mesh | None, label_smoothing: float, residuals: Any, cotangents: Any
) -> tuple[Any, ...]:
    """Return the gradients. The logits are recomputed, since storing them would take n² floats."""
    d_loss, _ = cotangents
    scale, images, texts, stats, num_positives = residuals
    mask = images.mask
    # exp(logit - max) times this weight is half of a candidate's probability.
    half_weights = [jnp.where(mask, 0.5 / s.sum_exp, 0.0) for s in stats]
    sides = (
        (images, stats[0].max, half_weights[0], (1 - label_smoothing) / num_positives),
        (texts, stats[1].max, half_weights[1]),
    )
    zeros = jnp.zeros_like(images.emb), jnp.zeros_like(texts.emb)
    scalars = scale, label_smoothing / safe_count(mask)
    d_image, d_text = reduce_pairs(_grad_block, scalars, sides, zeros, mesh=mesh)
    d_scale = d_loss * jnp.sum(images.emb * d_image)
    d_image, d_text = d_loss * scale * d_image, d_loss * scale * d_text
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
    """Add the candidates along `axis` to `stats`. `index` is their position in the batch."""
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
    """Add a block's gradients to `d_image` and `d_text`, without the factor `scale`.

    The gradient with respect to a logit is the mean of both directions' probabilities, minus the
    target. `images` and `texts` are those of `sides` in `_backward`.
    """
    scale, uniform_target = scalars
    images, image_max, image_weight, positive_target = images
    texts, text_max, text_weight = texts
    logits, valid, positive = pair_logits(images, texts, scale)
    logits = jnp.where(valid, logits, MASKED_LOGIT)
    d_logits = jnp.exp(logits - image_max[:, None]) * image_weight[:, None]
    d_logits += jnp.exp(logits - text_max[None, :]) * text_weight[None, :]
    target = jnp.where(positive, positive_target[:, None], 0.0)
    d_logits -= target + jnp.where(valid, uniform_target, 0.0)
    return d_image + matmul_float32(d_logits, texts.emb), d_text + matmul_float32(
        d_logits.T, images.emb
    )


def _num_positives(positive_id: Int[Array, " b"], mask: Bool[Array, " b"]) -> Float[Array, " b"]:
    """Return, for each row, the number of valid rows with its id (including itself), at least 1."""
    b = positive_id.shape[0]
    _, group = jnp.unique(positive_id, return_inverse=True, size=b)
    return jnp.maximum(jax.ops.segment_sum(mask.astype(jnp.float32), group, b)[group], 1)
