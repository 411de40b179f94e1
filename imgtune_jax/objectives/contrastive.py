"""What the contrastive objectives share: two sides, which pairs are positive, their logits."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.types import Batch, Outputs


class Positives(enum.StrEnum):
    """Which texts of a batch are right for an image.

    PAIR: its own alone, as in CLIP and SigLIP. GROUP: any text of the same `batch.group`, for data
    where several images share one meaning and would else be each other's false negatives
    (UniCL, 2204.03610).
    """

    PAIR = "pair"
    GROUP = "group"


class PairEmbeddings(NamedTuple):
    """The images of a batch, or its texts."""

    emb: Float[Array, "n d"]
    positive_id: Int[Array, " n"]  # the same on both sides: a positive pair
    index: Int[Array, " n"]  # place in the global batch
    mask: Bool[Array, " n"]


def pair_embeddings(
    outputs: Outputs, batch: Batch, *, positives: Positives, term: str
) -> tuple[PairEmbeddings, PairEmbeddings]:
    """(images, texts). Raises ValueError when the model or the data lacks what `term` needs."""
    if outputs.image_emb is None or outputs.text_emb is None:
        missing = "image" if outputs.image_emb is None else "text"
        raise ValueError(
            f"objective {term!r} needs both embeddings; the model gave no {missing}_emb"
        )
    chex.assert_equal_shape([outputs.image_emb, outputs.text_emb])
    valid = batch.example_mask
    index = jnp.arange(valid.shape[0])
    key = index if positives is Positives.PAIR else batch.group
    if key is None:
        raise ValueError(
            "positives='group' needs a `group` in every batch; name its field in the source "
            "(config.data.source.group), or use positives='pair'"
        )
    return PairEmbeddings(outputs.image_emb, key, index, valid), PairEmbeddings(
        outputs.text_emb, key, index, valid
    )


def cotangent_of(emb: Float[Array, "n d"]) -> PairEmbeddings:
    """What a custom gradient gives for a Side: its embeddings alone have one."""
    nothing: Any = None
    return PairEmbeddings(emb, nothing, nothing, nothing)


def pair_logits(
    images: PairEmbeddings, texts: PairEmbeddings, scale: Float[Array, ""]
) -> tuple[Float[Array, "n m"], Bool[Array, "n m"], Bool[Array, "n m"]]:
    """(scale · image @ textᵀ, is the pair valid, is it valid and positive); rows are images."""
    valid = images.mask[:, None] & texts.mask[None, :]
    positive = valid & (images.positive_id[:, None] == texts.positive_id[None, :])
    return scale * matmul_float32(images.emb, texts.emb.T), valid, positive


def matmul_float32(a: Float[Array, "n k"], b: Float[Array, "k m"]) -> Float[Array, "n m"]:
    """a @ b in full float32."""
    # HIGHEST: accelerators would else round the operands to bf16: 0.4 nats at scale 100.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
