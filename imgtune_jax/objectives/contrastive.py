"""Code shared by the contrastive losses: embeddings with masks, positive pairs, logits.

Axis letters: n images, m texts (or n of both), d width of the embeddings.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.errors import UserError
from imgtune_jax.types import Batch, Outputs


class Positives(enum.StrEnum):
    """The rule that decides which texts of a batch are positives of an image.

    PAIR: only the text of the same example, as in CLIP and SigLIP.
    GROUP: every text whose `batch.group` equals that of the image (UniCL, 2204.03610). Use it if
    several examples share one meaning: with PAIR, they would be false negatives of each other.
    """

    PAIR = "pair"
    GROUP = "group"

    @classmethod
    def _missing_(cls, value: object) -> Positives:
        raise UserError(f"positives = {value!r}; expected {' or '.join(cls)}")


class PairEmbeddings(NamedTuple):
    """The embeddings of images, or of texts, with the ids and masks that define the pairs."""

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
    """Return (images, texts). Row i of both is example i.

    `positive_id=None`: the only positive of image i is text i. `mask=None`: all rows are valid.
    Raises AssertionError if the shapes of the embeddings differ.
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

    Raises UserError if the outputs lack an embedding, or if `positives` is GROUP and the batch has
    no groups.
    """
    if outputs.image_emb is None or outputs.text_emb is None:
        missing = "image_emb" if outputs.image_emb is None else "text_emb"
        raise UserError(
            f"objective {term!r}: the model returned no {missing}; expected image and text "
            "embeddings; use a model with a text tower (config.model.text) and batches with images "
            "and text"
        )
    if positives is Positives.GROUP and batch.group is None:
        raise UserError(
            f"objective {term!r}: positives = 'group', but the batch has no `group`; set "
            "config.data.source.group to the metadata field of the group, or positives = 'pair'"
        )
    return pair_embeddings(
        outputs.image_emb,
        outputs.text_emb,
        positive_id=batch.group if positives is Positives.GROUP else None,
        mask=batch.example_mask,
    )


def cotangent_of(d_emb: Float[Array, "n d"]) -> PairEmbeddings:
    """Return `d_emb` as the cotangent of a PairEmbeddings, whose other fields have none."""
    no_cotangent: Any = None
    return PairEmbeddings(d_emb, no_cotangent, no_cotangent, no_cotangent)


def pair_logits(
    images: PairEmbeddings, texts: PairEmbeddings, scale: Float[Array, ""]
) -> tuple[Float[Array, "n m"], Bool[Array, "n m"], Bool[Array, "n m"]]:
    """Return (logits, mask of valid pairs, mask of positive pairs); rows are images.

    The logits are scale · images @ textsᵀ. A pair is valid if both its image and its text are
    valid. Only valid pairs are positive.
    """
    valid = images.mask[:, None] & texts.mask[None, :]
    positive = valid & (images.positive_id[:, None] == texts.positive_id[None, :])
    return scale * matmul_float32(images.emb, texts.emb.T), valid, positive


def matmul_float32(a: Float[Array, "n k"], b: Float[Array, "k m"]) -> Float[Array, "n m"]:
    """Return a @ b, computed in full float32 on every platform."""
    # By default, accelerators round the operands to bf16. At scale 100, the error is 0.4 nats.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def safe_count(mask: Bool[Array, " n"]) -> Float[Array, ""]:
    """Return the number of valid examples, but at least 1, so that it can be a divisor."""
    return jnp.maximum(mask.sum(dtype=jnp.float32), 1)
