"""Sigmoid contrastive loss (SigLIP, 2303.15343).

Axis letters: n images, m texts (or n of both), d width of the embeddings.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

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


def sigmoid_loss(
    image_emb: Float[Array, "n d"],
    text_emb: Float[Array, "n d"],
    *,
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float = 0.0,
    positive_id: Int[Array, " n"] | None = None,
    mask: Bool[Array, " n"] | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, ""]:
    """Return the sigmoid loss in nats per valid example (SigLIP, 2303.15343, Algorithm 1).

        loss = -1/n Σ_ij log σ(z_ij · (scale · x_i · y_j + bias)),  z_ij = ±1

    n is the number of valid examples, and the sum is over all n² pairs of them. z_ij is 1 for a
    positive pair and -1 for a negative one. The loss of a batch without valid examples is 0.

    Args:
      image_emb: x, float32, of unit norm.
      text_emb: y, float32, of unit norm. Text i belongs to image i.
      scale: the factor that multiplies the similarities, not its logarithm.
      bias: added to every logit.
      positive_id: image i and text j are a positive pair if their ids are equal. Default: i = j.
      mask: False for rows to ignore. Default: all rows are valid.
      mesh: the device mesh that shards the rows, whose number must be a multiple of the number of
        shards. Default: all rows are on one device.

    Memory grows linearly with the number of rows, not with its square. The embeddings, `scale` and
    `bias` have gradients, in reverse mode only.
    """
    images, texts = pair_embeddings(image_emb, text_emb, positive_id=positive_id, mask=mask)
    total: Any = _sum_over_pairs(mesh, jnp.float32(scale), jnp.float32(bias), images, texts)
    return total / safe_count(images.mask)


@dataclass(frozen=True)
class SigmoidLoss:
    """`sigmoid_loss` as an objective: over the global batch, with the model's scale and bias.

    The bias is 0 for a model without `logit_bias`. The metric "sigmoid" is the loss, in nats per
    valid example.
    """

    positives: Positives = Positives.PAIR
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "positives", Positives(self.positives))

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        """Return (loss, metrics). Raises UserError if the outputs lack an embedding."""
        pairs = output_embeddings(outputs, batch, positives=self.positives, term="sigmoid")
        assert outputs.logit_scale is not None  # a model with embeddings has one
        bias = jnp.float32(0) if outputs.logit_bias is None else outputs.logit_bias
        total: Any = _sum_over_pairs(self.mesh, outputs.logit_scale, bias, *pairs)
        count = jnp.sum(batch.example_mask, dtype=jnp.float32)
        return total / jnp.maximum(count, 1), {"sigmoid": (total, count)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over_pairs(
    mesh: Mesh | None,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    images: PairEmbeddings,
    texts: PairEmbeddings,
) -> Float[Array, ""]:
    """Return the loss, in nats, summed over all valid pairs."""
    sums = jnp.zeros(images.positive_id.shape), ()
    return jnp.sum(reduce_pairs(_loss_block, (scale, bias), (images, texts), sums, mesh=mesh)[0])


def _forward(
    mesh: Mesh | None,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    images: PairEmbeddings,
    texts: PairEmbeddings,
) -> tuple[Float[Array, ""], Any]:
    """Compute the loss and its gradients in one pass, so that every logit is computed once."""
    zeros = jnp.zeros(images.positive_id.shape)
    sums = (zeros, zeros, jnp.zeros_like(images.emb)), jnp.zeros_like(texts.emb)
    sums = reduce_pairs(_loss_and_grad_block, (scale, bias), (images, texts), sums, mesh=mesh)
    (loss, d_bias, d_image), d_text = sums
    d_scale = jnp.sum(images.emb * d_image)
    return jnp.sum(loss), (d_scale, jnp.sum(d_bias), scale * d_image, scale * d_text)


def _backward(mesh: Mesh | None, gradients: Any, d_loss: Float[Array, ""]) -> tuple[Any, ...]:
    d_scale, d_bias, d_image, d_text = (d_loss * x for x in gradients)
    return d_scale, d_bias, cotangent_of(d_image), cotangent_of(d_text)


_sum_over_pairs.defvjp(_forward, _backward)


def _loss_block(
    scalars: Any,
    images: PairEmbeddings,
    texts: PairEmbeddings,
    loss: Float[Array, " n"],
    _: tuple[()],
) -> tuple[Float[Array, " n"], tuple[()]]:
    return loss + _loss_and_d_logits(scalars, images, texts)[0], ()


def _loss_and_grad_block(
    scalars: Any,
    images: PairEmbeddings,
    texts: PairEmbeddings,
    image_sums: Any,
    d_text: Float[Array, "m d"],
) -> tuple[Any, Float[Array, "m d"]]:
    loss, d_bias, d_image = image_sums
    block_loss, d_logits = _loss_and_d_logits(scalars, images, texts)
    d_image += matmul_float32(d_logits, texts.emb)
    d_text += matmul_float32(d_logits.T, images.emb)
    return (loss + block_loss, d_bias + d_logits.sum(1), d_image), d_text


def _loss_and_d_logits(
    scalars: Any, images: PairEmbeddings, texts: PairEmbeddings
) -> tuple[Float[Array, " n"], Float[Array, "n m"]]:
    """Return (loss of each image, summed over the texts; gradient with respect to the logits)."""
    scale, bias = scalars
    logits, valid, positive = pair_logits(images, texts, scale)
    minus_z = jnp.where(positive, -1.0, 1.0)
    signed_logits = minus_z * (logits + bias)
    loss = jnp.where(valid, jax.nn.softplus(signed_logits), 0.0).sum(1)
    return loss, jnp.where(valid, minus_z * jax.nn.sigmoid(signed_logits), 0.0)
