"""BERT (1810.04805): bidirectional, post-norm; the text tower of the MiniLM sentence encoders."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.models import initializers, layers, pooling, sizes
from imgtune_jax.models.layer_stack import Part
from imgtune_jax.models.transformer import Transformer

INIT = initializers.normal(0.02)


class Bert(Transformer):
    """Token ids to a vector: masked mean of the last layer (MiniLM) or its first token.

    Padding, where `text_mask` is False, is seen by no token. The embedding of token type 0 is part
    of `pos_embed`: a single text has no other. From scratch, all matrices are normal(0.02).
    Raises ValueError if a text is longer than `max_length`.
    """

    VARIANTS: ClassVar[dict[str, dict[str, int]]] = {
        "minilm-l6": dict(width=384, depth=6, mlp_dim=1536, num_heads=12),
        "minilm-l12": dict(width=384, depth=12, mlp_dim=1536, num_heads=12),
        "base": dict(width=768, depth=12, mlp_dim=3072, num_heads=12),
        "large": dict(width=1024, depth=24, mlp_dim=4096, num_heads=16),
    }

    width: int = 384
    depth: int = 6
    mlp_dim: int = 1536
    num_heads: int = 12
    vocab_size: int = 30522
    max_length: int = 512
    pool: Literal["mean", "cls"] = "mean"
    act: str = "gelu"
    norm_epsilon: float = 1e-12

    @classmethod
    def variant_fields(cls, variant: str) -> dict[str, Any]:
        """The sizes behind a name of VARIANTS."""
        return sizes.get_variant(cls.VARIANTS, variant, "bert")

    @nn.compact
    def __call__(
        self,
        text: Int[Array, "b l"],
        text_mask: Bool[Array, "b l"],
        *,
        train: bool,
        part: Part = "whole",
    ) -> pooling.TowerOutput | Array:
        if text.shape[1] > self.max_length:
            raise ValueError(
                f"text of {text.shape[1]} tokens, but bert has max_length={self.max_length}; "
                "truncate in the tokenizer"
            )
        x = text
        if part != "rest":
            x = self._embed(text, train=train and self.num_frozen_layers == 0)
        x = self.run_blocks(x, text_mask, train=train, part=part, post_norm=True, kernel_init=INIT)
        if part == "front":
            return x
        if self.pool not in ("mean", "cls"):
            raise ValueError(f"bert pool={self.pool!r}; want 'mean' or 'cls'")
        pooled = pooling.masked_mean(x, text_mask) if self.pool == "mean" else x[:, 0]
        return pooling.TowerOutput(pooled, x)

    def _embed(self, text: Int[Array, "b l"], *, train: bool) -> Float[Array, "b l d"]:
        token = layers.Embed(self.vocab_size, self.width, INIT, name="token_embed")
        position = self.param("pos_embed", INIT, (self.max_length, self.width), jnp.float32)
        x = token(text) + position[None, : text.shape[1]]
        x = layers.LayerNorm(self.norm_epsilon, name="embed_norm")(x)
        return nn.Dropout(self.dropout, deterministic=not train)(x)
