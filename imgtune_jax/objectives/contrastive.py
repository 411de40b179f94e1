"""What the contrastive objectives share: which pairs are positive, and all pairs' logits."""

from __future__ import annotations

import enum

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from imgtune_jax.types import Batch, Outputs


class Positives(enum.StrEnum):
    """Which texts of a batch are right for an image.

    PAIR: its own alone, as in CLIP and SigLIP. GROUP: any text of the same `batch.group`, for data
    where several images share one meaning and would else be each other's false negatives
    (UniCL, 2204.03610).
    """

    PAIR = "pair"
    GROUP = "group"


def positive_pairs(batch: Batch, positives: Positives) -> Bool[Array, "b b"]:
    """True where the row's image and the column's text belong together and both are valid.

    Raises ValueError when groups are wanted and the data gives none.
    """
    n = batch.example_mask.shape[0]
    if positives is Positives.PAIR:
        same = jnp.eye(n, dtype=bool)
    elif batch.group is None:
        raise ValueError(
            "positives='group' needs a `group` in every batch; name its field in the source "
            "(config.data.source.group), or use positives='pair'"
        )
    else:
        same = batch.group[:, None] == batch.group[None, :]
    return same & batch.example_mask[:, None] & batch.example_mask[None, :]


def embeddings(outputs: Outputs, term: str) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
    """(image, text) embeddings. Raises ValueError when the model gave only one."""
    if outputs.image_emb is None or outputs.text_emb is None:
        missing = "image" if outputs.image_emb is None else "text"
        raise ValueError(
            f"objective {term!r} needs both embeddings; the model gave no {missing}_emb"
        )
    chex.assert_equal_shape([outputs.image_emb, outputs.text_emb])
    return outputs.image_emb, outputs.text_emb


def pair_logits(
    image: Float[Array, "b d"], text: Float[Array, "b d"], scale: Float[Array, ""]
) -> Float[Array, "b b"]:
    """scale · image @ textᵀ, rows are images."""
    # HIGHEST: accelerators would else round the operands to bf16: 0.4 nats at scale 100.
    return scale * jnp.matmul(image, text.T, precision=jax.lax.Precision.HIGHEST)
