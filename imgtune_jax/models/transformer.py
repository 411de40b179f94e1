"""Base classes of the transformers: their fields, and methods to run or to decode with blocks.

Axis letters: m context tokens of width e (in text towers, m tokens), p positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.errors import UserError
from imgtune_jax.models import initializers, layers, pooling, sizes
from imgtune_jax.models.attention import KVCache
from imgtune_jax.models.block import Block, LayerCache
from imgtune_jax.models.layer_stack import LayerStack, Segment
from imgtune_jax.models.pooling import TowerOutput
from imgtune_jax.types import Constrain, no_constraint

LayerCaches = tuple[LayerCache, ...]


class Transformer(nn.Module):
    """Base of modules with `depth` blocks of one kind.

    `remat`, `scan`, `num_frozen_layers` and `constrain` are as in `LayerStack`.
    `hand_written_gradients=True` is faster, and supports reverse mode only; with False,
    `jax.jvp` and `jax.linearize` work too, with equal values and gradients.
    """

    CONFIG_NAME: ClassVar[str]
    VARIANTS: ClassVar[Mapping[str, Mapping[str, Any]]] = sizes.SIZES

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
    hand_written_gradients: bool = True
    constrain: Constrain = no_constraint

    @classmethod
    def variant_fields(cls, variant: str) -> dict[str, Any]:
        """Return the sizes of a variant, a key of VARIANTS."""
        return sizes.get_variant(cls.VARIANTS, variant, cls.CONFIG_NAME)

    def block(self, **fields: Any) -> Block:
        """Return an unbound block of this module's sizes; `fields` are other fields of `Block`."""
        return Block(
            self.num_heads,
            self.mlp_dim,
            act=self.act,
            norm_epsilon=self.norm_epsilon,
            dropout=self.dropout,
            dtype=self.dtype,
            hand_written_gradients=self.hand_written_gradients,
            parent=None,
            **fields,
        )

    def norm(self, name: str) -> layers.LayerNorm:
        """Return a LayerNorm submodule of that name."""
        return layers.LayerNorm(self.norm_epsilon, self.hand_written_gradients, name=name)

    def apply_norm(self, name: str, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """Apply the LayerNorm of that name outside of a compact method, for decoding."""
        norm = layers.LayerNorm(self.norm_epsilon, self.hand_written_gradients, parent=None)
        return cast(Array, norm.apply({"params": self.variables["params"][name]}, x))

    def run_blocks(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "b l"] | Bool[Array, "b l l"] | None = None,
        *,
        train: bool = False,
        segment: Segment = Segment.FULL,
        context: Float[Array, "b m e"] | None = None,
        **fields: Any,
    ) -> Float[Array, "b l d"]:
        """Run the blocks of a segment, `blocks_0` first; `fields` as in `block`."""
        stack = LayerStack(
            self.depth, self.scan, self.remat, self.num_frozen_layers, self.constrain
        )
        return stack(self, self.block(**fields), x, mask, context, train=train, segment=segment)

    def decode_blocks(
        self,
        block: Block,
        x: Float[Array, "b 1 d"],
        caches: LayerCaches,
        position: Int[Array, " b"],
    ) -> tuple[Float[Array, "b 1 d"], LayerCaches]:
        """Run one position per row through all blocks; return its token and the updated caches."""
        params, apply = self.variables["params"], cast(Any, block.apply)
        updated = []
        for i, cache in enumerate(caches):
            layer_params = {"params": params[f"blocks_{i}"]}
            x, cache = apply(layer_params, x, cache, position, method="decode_step")
            updated.append(cache)
        return x, tuple(updated)

    def init_kv_cache(self, batch: int, length: int) -> KVCache:
        """Return an empty cache of one layer, with capacity for `length` positions."""
        return KVCache.init(
            batch, length, num_heads=self.num_heads, width=self.width, dtype=self.dtype
        )


class TransformerTower(Transformer):
    """Base of image and text towers: embed, run the blocks, pool.

    A tower can also run in two steps: `run_prefix`, whose output can be cached, and `run_suffix`.
    The split is after the first `num_frozen_layers` layers, or after all layers if that is -1.
    """

    def _embed(self, inputs: Array, *, train: bool) -> Float[Array, "b l d"]:
        raise NotImplementedError

    def _pool(self, x: Array, mask: Array | None, *, train: bool) -> TowerOutput:
        raise NotImplementedError

    def _key_mask(self, mask: Array | None) -> Array | None:
        return mask

    def _block_fields(self) -> dict[str, Any]:
        return {}

    @nn.compact
    def _run(
        self,
        inputs: Array,
        mask: Array | None = None,
        *,
        train: bool = False,
        segment: Segment = Segment.FULL,
    ) -> TowerOutput | Array:
        """Return the output, or the tokens if the segment is the prefix."""
        x = inputs
        if segment is not Segment.SUFFIX:
            x = self._embed(inputs, train=train and self.num_frozen_layers == 0)
        fields = self._block_fields()
        x = self.run_blocks(x, self._key_mask(mask), train=train, segment=segment, **fields)
        if segment is Segment.PREFIX:
            return x
        return self._pool(x, mask, train=train and self.num_frozen_layers != -1)

    def _map_head(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None, *, train: bool
    ) -> Float[Array, "b d"]:
        """Pool with a `MAPHead` of the tower's sizes, named `pool`."""
        head = pooling.MAPHead(
            self.num_heads,
            self.mlp_dim,
            self.act,
            self.norm_epsilon,
            self.dropout,
            self.dtype,
            self.hand_written_gradients,
            name="pool",
        )
        return head(x, mask, train=train)


class TextTower(TransformerTower):
    """Base of text towers. Raises UserError if a text is longer than `max_length`."""

    vocab_size: int = 32000
    max_length: int = 64

    def __call__(
        self, text: Int[Array, "b l"], text_mask: Bool[Array, "b l"], *, train: bool = False
    ) -> TowerOutput:
        return cast(TowerOutput, self._run(text, text_mask, train=train))

    def run_prefix(
        self, text: Int[Array, "b l"], text_mask: Bool[Array, "b l"]
    ) -> Float[Array, "b m d"]:
        """Return the tokens after the frozen layers, in eval mode."""
        return cast(Array, self._run(text, text_mask, segment=Segment.PREFIX))

    def run_suffix(
        self,
        tokens: Float[Array, "b m d"],
        text_mask: Bool[Array, "b l"],
        *,
        train: bool = False,
    ) -> TowerOutput:
        """Return the tower's output, given the output of `run_prefix`."""
        tower_output = self._run(tokens, text_mask, train=train, segment=Segment.SUFFIX)
        return cast(TowerOutput, tower_output)

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise UserError(
                f"text of {length} tokens, but {self.CONFIG_NAME} has "
                f"max_length={self.max_length}; truncate in the tokenizer (and keep the end token)"
            )

    def _embed_tokens(
        self,
        text: Int[Array, "b l"],
        token_init: initializers.Initializer,
        position_init: initializers.Initializer,
        num_positions: int,
    ) -> tuple[Float[Array, "b l d"], Float[Array, "p d"]]:
        """Return token plus position embeddings, and the table of positions."""
        token = layers.Embed(self.vocab_size, self.width, token_init, name="token_embed")
        shape = (num_positions, self.width)
        position = initializers.param(self, "pos_embed", position_init, shape)
        return token(text) + position[None, : text.shape[1]], position
