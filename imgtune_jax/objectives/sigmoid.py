"""Sigmoid contrastive loss (SigLIP, 2303.15343)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

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


@dataclass(frozen=True)
class SigmoidLoss:
    """Sum over all pairs of valid examples, divided by the number of valid examples (Algorithm 1).

    -log σ(z · (scale · cos + bias)), z = +1 for a positive pair and -1 for a negative one. A model
    without a `logit_bias` runs with a bias of 0.
    """

    positives: Positives = Positives.PAIR
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "positives", Positives(self.positives))

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        """Loss and its metrics; exact over the global batch."""
        pairs = pair_embeddings(outputs, batch, positives=self.positives, term="sigmoid")
        assert outputs.logit_scale is not None  # a model with embeddings has one
        bias = jnp.float32(0) if outputs.logit_bias is None else outputs.logit_bias
        total: Any = sigmoid_loss(self.mesh, outputs.logit_scale, bias, *pairs)
        count = jnp.sum(batch.example_mask, dtype=jnp.float32)
        return total / jnp.maximum(count, 1), {"sigmoid": (total, count)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sigmoid_loss(
    mesh: Mesh | None,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    images: PairEmbeddings,
    texts: PairEmbeddings,
) -> Float[Array, ""]:
    """-log σ, summed over all pairs."""
    nats = jnp.zeros(images.positive_id.shape), ()
    return jnp.sum(reduce_pairs(_loss_block, (scale, bias), (images, texts), nats, mesh=mesh)[0])


def _nats_and_gradients(
    mesh: Mesh | None,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    images: PairEmbeddings,
    texts: PairEmbeddings,
) -> tuple[Float[Array, ""], Any]:
    """One pass: the slopes of a block are at hand when its nats are, so no pair is met twice."""
    zeros = jnp.zeros(images.positive_id.shape)
    sums = (zeros, zeros, jnp.zeros_like(images.emb)), jnp.zeros_like(texts.emb)
    sums = reduce_pairs(_loss_and_grad_block, (scale, bias), (images, texts), sums, mesh=mesh)
    (nats, d_bias, d_image), d_text = sums
    d_scale = jnp.sum(images.emb * d_image)
    return jnp.sum(nats), (d_scale, jnp.sum(d_bias), scale * d_image, scale * d_text)


def _pull_back(mesh: Mesh | None, gradients: Any, g: Float[Array, ""]) -> tuple[Any, ...]:
    d_scale, d_bias, d_image, d_text = (g * x for x in gradients)
    return d_scale, d_bias, cotangent_of(d_image), cotangent_of(d_text)


sigmoid_loss.defvjp(_nats_and_gradients, _pull_back)


def _loss_block(
    scalars: Any,
    images: PairEmbeddings,
    texts: PairEmbeddings,
    nats: Float[Array, " n"],
    _: tuple[()],
) -> tuple[Float[Array, " n"], tuple[()]]:
    return nats + _block(scalars, images, texts)[0], ()


def _loss_and_grad_block(
    scalars: Any,
    images: PairEmbeddings,
    texts: PairEmbeddings,
    image_sums: Any,
    d_text: Float[Array, "m d"],
) -> tuple[Any, Float[Array, "m d"]]:
    nats, d_bias, d_image = image_sums
    more, d_logits = _block(scalars, images, texts)
    d_image += matmul_float32(d_logits, texts.emb)
    d_text += matmul_float32(d_logits.T, images.emb)
    return (nats + more, d_bias + d_logits.sum(1), d_image), d_text


def _block(
    scalars: Any, images: PairEmbeddings, texts: PairEmbeddings
) -> tuple[Float[Array, " n"], Float[Array, "n m"]]:
    """(nats of the images, d nats / d logit of the pairs)."""
    scale, bias = scalars
    logits, valid, positive = pair_logits(images, texts, scale)
    sign = jnp.where(positive, -1.0, 1.0)  # -z
    signed = sign * (logits + bias)
    nats = jnp.where(valid, jax.nn.softplus(signed), 0.0).sum(1)
    return nats, jnp.where(valid, sign * jax.nn.sigmoid(signed), 0.0)
