"""Code shared by the contrastive losses: embeddings with masks, positive pairs, logits."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.types import Batch, Outputs


class Positives(enum.StrEnum):
    """Which texts of a batch are positives of an image.

    PAIR: only the text of the same example, as in CLIP and SigLIP. GROUP: every text with the same
    `batch.group` (UniCL, 2204.03610), for data in which several images share one meaning and would
    otherwise be false negatives of each other.
    """

    PAIR = "pair"
    GROUP = "group"


class PairEmbeddings(NamedTuple):
    """Embeddings of all images of a batch, or of all its texts."""

    emb: Float[Array, "n d"]
    positive_id: Int[Array, " n"]  # an image and a text with equal ids are a positive pair
    index: Int[Array, " n"]  # position in the global batch
    mask: Bool[Array, " n"]  # False: padding or a bad record


def pair_embeddings(
    image_emb: Float[Array, "n d"],
    text_emb: Float[Array, "n d"],
    *,
    positive_id: Int[Array, " n"] | None,
    mask: Bool[Array, " n"] | None,
) -> tuple[PairEmbeddings, PairEmbeddings]:
    """Return (images, texts). Row i of both is example i; by default all rows are valid.

    `positive_id=None`: the only positive of image i is text i. Raises AssertionError if the shapes
    of the embeddings differ.
    """
    chex.assert_equal_shape([image_emb, text_emb])
    index = jnp.arange(image_emb.shape[0])
    positive_id = index if positive_id is None else positive_id
    mask = jnp.ones(image_emb.shape[0], bool) if mask is None else mask
    return (
        PairEmbeddings(image_emb, positive_id, index, mask),
        PairEmbeddings(text_emb, positive_id, index, mask),
    )


def output_embeddings(
    outputs: Outputs, batch: Batch, *, positives: Positives, term: str
) -> tuple[PairEmbeddings, PairEmbeddings]:
    """Return (images, texts) of a batch for the objective named `term`.

    Raises ValueError if the outputs lack an embedding, or the batch lacks groups that it needs.
    """
    if outputs.image_emb is None or outputs.text_emb is None:
        missing = "image_emb" if outputs.image_emb is None else "text_emb"
        raise ValueError(
            f"objective {term!r}: the model returned no {missing}; expected image and text "
            "embeddings; use a model with a text tower (config.model.text) and batches with images "
            "and text"
        )
    if positives is Positives.GROUP and batch.group is None:
        raise ValueError(
            f"objective {term!r}: positives = 'group', but the batch has no `group`; name the "
            "group's field in config.data.source.group, or set positives = 'pair'"
        )
    return pair_embeddings(
        outputs.image_emb,
        outputs.text_emb,
        positive_id=batch.group if positives is Positives.GROUP else None,
        mask=batch.example_mask,
    )


def cotangent_of(emb: Float[Array, "n d"]) -> PairEmbeddings:
    """Return the cotangent of a PairEmbeddings. Only `emb` has one; ids and masks have none."""
    no_cotangent: Any = None
    return PairEmbeddings(emb, no_cotangent, no_cotangent, no_cotangent)


def pair_logits(
    images: PairEmbeddings, texts: PairEmbeddings, scale: Float[Array, ""]
) -> tuple[Float[Array, "n m"], Bool[Array, "n m"], Bool[Array, "n m"]]:
    """Return (scale · image @ textᵀ, mask of valid pairs, mask of positive pairs); rows are images.

    A pair is valid if its image and its text are. Only valid pairs are positive.
    """
    valid = images.mask[:, None] & texts.mask[None, :]
    positive = valid & (images.positive_id[:, None] == texts.positive_id[None, :])
    return scale * matmul_float32(images.emb, texts.emb.T), valid, positive


def matmul_float32(a: Float[Array, "n k"], b: Float[Array, "k m"]) -> Float[Array, "n m"]:
    """Return a @ b, computed in full float32 on every platform."""
    # By default, accelerators round the operands to bf16: an error of 0.4 nats at scale 100.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def safe_count(mask: Bool[Array, " n"]) -> Float[Array, ""]:
    """Return the number of valid examples as a divisor: float32, at least 1."""
    return jnp.maximum(mask.sum(dtype=jnp.float32), 1)
