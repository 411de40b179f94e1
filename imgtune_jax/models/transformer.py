"""What the transformer towers share: sizes, and how their blocks are run and pooled."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from imgtune_jax.models import layers, pooling
from imgtune_jax.models.stack import Part, Stack


class Transformer(nn.Module):
    """A tower around `depth` blocks of one kind; see Stack for the fields that change no value.

    A tower is called on its input, or, where its first `num_frozen_layers` were run before, with
    part="rest" on the tokens that part="front" gave.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    act: str = "gelu"
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: layers.Dtype = jnp.float32
    remat: bool = False
    scan: bool = False
    num_frozen_layers: int = 0
    constrain: layers.Constrain = layers.no_constraint

    def run_blocks(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "b l"] | None = None,
        *,
        train: bool,
        part: Part,
        **fields: Any,
    ) -> Float[Array, "b l d"]:
        """All blocks, `blocks_0` first; `fields` are further ones of `layers.Block`."""
        block = layers.Block(
            self.num_heads,
            self.mlp_dim,
            act=self.act,
            norm_epsilon=self.norm_epsilon,
            dropout=self.dropout,
            dtype=self.dtype,
            parent=None,
            **fields,
        )
        stack = Stack(self.depth, self.scan, self.remat, self.num_frozen_layers, self.constrain)
        return stack(self, block, x, mask, train=train, part=part)

    def attention_pool(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None, *, train: bool
    ) -> Float[Array, "b d"]:
        """An AttentionPool of the tower's sizes, named `pool`."""
        pool = pooling.AttentionPool(
            self.num_heads,
            self.mlp_dim,
            self.act,
            self.norm_epsilon,
            self.dropout,
            self.dtype,
            name="pool",
        )
        return pool(x, mask, train=train)
