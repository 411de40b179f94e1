"""A stack of equal blocks: parameters kept per layer, run by a loop or by `lax.scan`.

At rest the layers are `blocks_0`, `blocks_1`, … so that a regex on the path can lock or scale one
of them. A scan stacks them inside apply: one copy of one tree, for a compile time that does not
grow with depth.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from imgtune_jax.models import layers
from imgtune_jax.models.block import Block
from imgtune_jax.types import Params

Part = Literal["whole", "front", "rest"]


@dataclasses.dataclass(frozen=True)
class LayerStack:
    """How `depth` copies of a block are run. None of these fields changes a value.

    The exception is `num_frozen_layers`: the first n layers run in eval mode (no dropout), and all
    of them when it is -1. `remat` recomputes a block's activations in the backward pass.
    """

    depth: int
    scan: bool = False
    remat: bool = False
    num_frozen_layers: int = 0
    constrain: layers.Constrain = layers.no_constraint

    def __post_init__(self):
        if not -1 <= self.num_frozen_layers <= self.depth:
            raise ValueError(
                f"num_frozen_layers={self.num_frozen_layers} for {self.depth} layers; "
                f"want 0 to {self.depth}, or -1 for the whole tower"
            )

    def __call__(
        self,
        parent: nn.Module,
        block: Block,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "b l"] | Bool[Array, "b l l"] | None = None,
        *,
        train: bool,
        part: Part = "whole",
        context: Float[Array, "b m e"] | None = None,
    ) -> Float[Array, "b l d"]:
        """Runs `block` (unbound: parent=None) with the parameters `blocks_i` of `parent`.

        `part` is the whole stack, its frozen "front", or the "rest" on the front's output. Raises
        KeyError if the parameters of a layer that runs are absent.
        """
        x = self.constrain(x, layers.RESIDUAL_AXES)
        if parent.is_initializing():
            return self._init(parent, block, x, mask, context)
        tree = parent.variables["params"]
        cut = self.depth if self.num_frozen_layers == -1 else self.num_frozen_layers
        key = parent.make_rng("dropout") if train and block.dropout else jax.random.key(0)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(self.depth))
        # Two runs, not one: no gradient is computed through a run whose parameters are all frozen.
        if part != "rest":
            params = [tree[f"blocks_{i}"] for i in range(cut)]
            x = self._run(block, (mask, context), x, params, keys[:cut], train=False)
        if part != "front":
            params = [tree[f"blocks_{i}"] for i in range(cut, self.depth)]
            x = self._run(block, (mask, context), x, params, keys[cut:], train=train)
        return x

    def _init(self, parent: nn.Module, block: Block, x: Array, *others: Array | None) -> Array:
        """Declares every layer's parameters; the values come later, see `init`."""

        def declare(key: jax.Array) -> Params:
            return cast(Params, block.init(key, x, *others, train=False)["params"])

        for i in range(self.depth):
            parent.param(f"blocks_{i}", declare)
        return x

    def _run(
        self,
        block: Block,
        others: tuple[Array | None, ...],
        x: Array,
        params: list[Params],
        keys: Array,
        *,
        train: bool,
    ) -> Array:
        def layer(x: Array, layer_params: Params, key: Array) -> Array:
            rngs = {"dropout": key}
            y = block.apply({"params": layer_params}, x, *others, train=train, rngs=rngs)
            return self.constrain(cast(Array, y), layers.RESIDUAL_AXES)

        # XLA:CPU drops the barriers that keep a recomputation apart; a scan's iterations stay so.
        scan = self.scan or (self.remat and jax.default_backend() == "cpu")
        if self.remat:
            # Inside a scan nothing can be merged across iterations, so no barrier is needed.
            layer = functools.partial(jax.checkpoint, prevent_cse=not scan)(layer)
        if scan and len(params) > 1:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
            return jax.lax.scan(lambda x, p: (layer(x, *p), None), x, (stacked, keys))[0]
        for i, layer_params in enumerate(params):
            x = layer(x, layer_params, keys[i])
        return x
