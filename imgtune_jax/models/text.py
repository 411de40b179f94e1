"""A pre-norm text transformer: CLIP's (causal, pooled at EOT) and SigLIP's (bidirectional)."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.models import init, layers, pooling, sizes
from imgtune_jax.models.stack import Part
from imgtune_jax.models.transformer import Transformer


class TextTransformer(Transformer):
    """Token ids to a vector.

    `pool` is one of
      eot        the last position where `text_mask` holds. Not argmax(token id), which breaks as
                 soon as a token is added.
      last       position l-1 whatever the mask: SigLIP, whose texts are padded to exactly
                 `max_length`; another length is an error, since it would change the scores.
      first      position 0.
      mean       over the positions where `text_mask` holds.
      attention  one learned query over those positions (see AttentionPool).

    `mask_padding` hides padding keys from every query; SigLIP needs False. CLIP's causal mask
    alone hides what comes after EOT, so there the pooled vector is the same either way.

    From scratch: token and position embeddings normal(0.02) and normal(0.01) as in CLIP, matrices
    Xavier normal.
    """

    width: int = 512
    depth: int = 12
    mlp_dim: int = 2048
    num_heads: int = 8
    vocab_size: int = 49408
    max_length: int = 77
    causal: bool = True
    mask_padding: bool = True
    pool: Literal["eot", "last", "first", "mean", "attention"] = "eot"
    act: str = "gelu"
    norm_epsilon: float = 1e-5

    @classmethod
    def variant_fields(cls, variant: str) -> dict[str, Any]:
        """The sizes behind "Ti", "S", "B", …"""
        return sizes.lookup(sizes.SIZES, variant, "text_transformer")

    @nn.compact
    def __call__(
        self,
        text: Int[Array, "b l"],
        text_mask: Bool[Array, "b l"],
        *,
        train: bool,
        part: Part = "whole",
    ) -> pooling.TowerOutput | Array:
        self._check(text.shape[1])
        x = text
        if part != "rest":
            x = self._embed(text, train=train and self.num_frozen_layers == 0)
        mask = text_mask if self.mask_padding else None
        x = self.run_blocks(x, mask, train=train, part=part, causal=self.causal)
        if part == "front":
            return x
        x = layers.LayerNorm(self.norm_epsilon, name="final_norm")(x)
        pooled = self._pool(x, text_mask, train=train and self.num_frozen_layers != -1)
        return pooling.TowerOutput(pooled, x)

    def _check(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(
                f"text of {length} tokens, but text_transformer has max_length={self.max_length}; "
                "truncate in the tokenizer (and keep EOT)"
            )
        if self.pool == "last" and length != self.max_length:
            raise ValueError(
                f"pool='last' reads the last position, so text must be padded to exactly "
                f"max_length={self.max_length}; got {length}"
            )

    def _embed(self, text: Int[Array, "b l"], *, train: bool) -> Float[Array, "b l d"]:
        token = layers.Embed(self.vocab_size, self.width, name="token_embed")
        shape = (self.max_length, self.width)
        position = self.param("pos_embed", init.normal(0.01), shape, jnp.float32)
        x = token(text) + position[None, : text.shape[1]]
        return nn.Dropout(self.dropout, deterministic=not train)(x)

    def _pool(self, x: Array, mask: Array, *, train: bool) -> Array:
        if self.pool == "eot":
            return jnp.take_along_axis(x, pooling.last_valid(mask)[:, None, None], axis=1)[:, 0]
        if self.pool == "last":
            return x[:, -1]
        if self.pool == "first":
            return x[:, 0]
        if self.pool == "mean":
            return pooling.masked_mean(x, mask)
        if self.pool == "attention":
            return self.attention_pool(x, mask, train=train)
        raise ValueError(
            f"text_transformer pool={self.pool!r}; want 'eot', 'last', 'first', 'mean' or "
            "'attention'"
        )
