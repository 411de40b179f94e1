"""A stack of layers, one `Block` each, that run in a loop or in a `lax.scan`.

In the parameter tree the layers are `blocks_0`, `blocks_1`, …, so that a regex on the path can
select one of them, to lock it for example. A scan stacks their parameters inside `apply` and
compiles one layer, so its compile time does not grow with depth.

Axis letters: m context tokens of width e.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core.scope import LazyRng
from jaxtyping import Array, Bool, Float

from imgtune_jax import xla_cpu
from imgtune_jax.errors import UserError
from imgtune_jax.models import layers
from imgtune_jax.models.block import Block
from imgtune_jax.types import Constrain, Params, no_constraint


class Segment(enum.Enum):
    """Which layers run: all, the frozen prefix, or the suffix after it."""

    FULL = "full"
    PREFIX = "prefix"
    SUFFIX = "suffix"


@dataclasses.dataclass(frozen=True)
class LayerStack:
    """`depth` layers, and how they run.

    The first `num_frozen_layers` layers run in eval mode, without dropout; -1 means all layers.
    `scan` runs the layers in a `lax.scan`; `remat` recomputes a block's activations in the backward
    pass. Neither of `scan`, `remat` and `constrain` changes a value.
    """

    depth: int
    scan: bool = False
    remat: bool = False
    num_frozen_layers: int = 0
    constrain: Constrain = no_constraint

    def __post_init__(self):
        if not -1 <= self.num_frozen_layers <= self.depth:
            raise UserError(
                f"num_frozen_layers = {self.num_frozen_layers} for {self.depth} layers; "
                f"expected 0 to {self.depth}, or -1 for the full tower"
            )

    def __call__(
        self,
        parent: nn.Module,
        block: Block,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "b l"] | Bool[Array, "b l l"] | None = None,
        context: Float[Array, "b m e"] | None = None,
        *,
        train: bool = False,
        segment: Segment = Segment.FULL,
    ) -> Float[Array, "b l d"]:
        """Run `block`, an unbound module, with the parameters `blocks_i` of `parent`.

        While `parent` is initialized or collects intermediates, the layers are its submodules, so
        that Linen can create their parameters or collect their outputs. They then run in a loop
        without remat. Raises KeyError if the parameters of a layer that runs are absent.
        """
        x = self.constrain(x, layers.RESIDUAL_AXES)
        n = self.depth if self.num_frozen_layers == -1 else self.num_frozen_layers
        key = parent.make_rng("dropout") if train and block.dropout else jax.random.key(0)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(self.depth))
        run = functools.partial(self._run, parent, block, (mask, context), keys)
        # The frozen layers run separately, so that no gradient is computed through them.
        if segment is not Segment.SUFFIX:
            x = run(x, range(n), train=False)
        if segment is not Segment.PREFIX:
            x = run(x, range(n, self.depth), train=train)
        return x

    def _run(
        self,
        parent: nn.Module,
        block: Block,
        mask_and_context: tuple[Array | None, ...],
        keys: Array,
        x: Array,
        indices: range,
        *,
        train: bool,
    ) -> Array:
        """Run layers as submodules of `parent`, or as functions of their parameters."""
        if parent.is_initializing() or parent.is_mutable_collection("intermediates"):
            for i in indices:
                bound = block.clone(parent=parent, name=f"blocks_{i}")
                if train and block.dropout:  # so that both forms have the same dropout
                    assert bound.scope is not None
                    bound.scope.rngs = {**bound.scope.rngs, "dropout": LazyRng.create(keys[i])}
                x = self.constrain(bound(x, *mask_and_context, train=train), layers.RESIDUAL_AXES)
            return x
        params = [parent.variables["params"][f"blocks_{i}"] for i in indices]
        keys = keys[indices.start : indices.stop]

        def layer(x: Array, layer_params: Params, key: Array) -> Array:
            rngs = {"dropout": key}
            variables = {"params": layer_params}
            y = block.apply(variables, x, *mask_and_context, train=train, rngs=rngs)
            return self.constrain(cast(Array, y), layers.RESIDUAL_AXES)

        scan = self.scan or (self.remat and xla_cpu.remat_needs_scan())
        if self.remat:
            # XLA merges no computations across the iterations of a scan, so no barrier is needed.
            layer = functools.partial(jax.checkpoint, prevent_cse=not scan)(layer)
        if scan and len(params) > 1:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
            return jax.lax.scan(lambda x, inputs: (layer(x, *inputs), None), x, (stacked, keys))[0]
        for i, layer_params in enumerate(params):
            x = layer(x, layer_params, keys[i])
        return x
