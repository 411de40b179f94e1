"""What the transformer towers share: sizes, and how their blocks are run and pooled."""

from __future__ import annotations

from typing import Any, cast

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.models import layers, pooling
from imgtune_jax.models.block import Block, LayerCache
from imgtune_jax.models.layer_stack import LayerStack, Part
from imgtune_jax.models.layers import KVCache

LayerCaches = tuple[LayerCache, ...]


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

    def block(self, **fields: Any) -> Block:
        """A block of the tower's sizes, unbound; `fields` are further ones of `Block`."""
        return Block(
            self.num_heads,
            self.mlp_dim,
            act=self.act,
            norm_epsilon=self.norm_epsilon,
            dropout=self.dropout,
            dtype=self.dtype,
            parent=None,
            **fields,
        )

    def run_blocks(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "b l"] | Bool[Array, "b l l"] | None = None,
        *,
        train: bool,
        part: Part = "whole",
        context: Float[Array, "b m e"] | None = None,
        **fields: Any,
    ) -> Float[Array, "b l d"]:
        """All blocks, `blocks_0` first; `fields` as in `block`."""
        stack = LayerStack(
            self.depth, self.scan, self.remat, self.num_frozen_layers, self.constrain
        )
        block = self.block(**fields)
        return stack(self, block, x, mask, train=train, part=part, context=context)

    def decode_blocks(
        self,
        block: Block,
        x: Float[Array, "b 1 d"],
        caches: LayerCaches,
        position: Int[Array, " b"],
    ) -> tuple[Float[Array, "b 1 d"], LayerCaches]:
        """One position of each row through all blocks."""
        tree, step = self.variables["params"], cast(Any, block.apply)
        kept = []
        for i, cache in enumerate(caches):
            x, new = step({"params": tree[f"blocks_{i}"]}, x, cache, position, method="decode_step")
            kept.append(new)
        return x, tuple(kept)

    def init_kv_cache(self, batch: int, length: int) -> KVCache:
        """Room for the keys and values of one layer."""
        sizes: dict[str, Any] = dict(num_heads=self.num_heads, width=self.width, dtype=self.dtype)
        return KVCache.init(batch, length, **sizes)

    def attention_pool(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None, *, train: bool
    ) -> Float[Array, "b d"]:
        """An AttentionPool of the tower's sizes, named `pool`."""
        pool = pooling.MAPHead(
            self.num_heads,
            self.mlp_dim,
            self.act,
            self.norm_epsilon,
            self.dropout,
            self.dtype,
            name="pool",
        )
        return pool(x, mask, train=train)
