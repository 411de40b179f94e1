"""A stack of equal blocks: one set of parameters per layer, run by a loop or by `lax.scan`.

In the parameter tree the layers are `blocks_0`, `blocks_1`, … so that a regex on the path can lock
or scale one of them. A scan stacks them inside `apply` and compiles one layer, so its compile time
does not grow with depth.
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
    """`depth` copies of a block, and how they run. No field changes a value, with one exception.

    The exception is `num_frozen_layers`: the first n layers run in eval mode (no dropout), all of
    them if it is -1. `remat` recomputes a block's activations in the backward pass.
    """

    depth: int
    scan: bool = False
    remat: bool = False
    num_frozen_layers: int = 0
    constrain: Constrain = no_constraint

    def __post_init__(self):
        if not -1 <= self.num_frozen_layers <= self.depth:
            raise ValueError(
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
        """Run `block` (unbound: parent=None) with the parameters `blocks_i` of `parent`.

        If `parent` collects intermediates, the layers are its submodules and run by a loop without
        remat, whatever `scan` and `remat` say, so that the output of each is collected. Raises
        KeyError if the parameters of a layer that runs are absent.
        """
        x = self.constrain(x, layers.RESIDUAL_AXES)
        n = self.depth if self.num_frozen_layers == -1 else self.num_frozen_layers
        key = parent.make_rng("dropout") if train and block.dropout else jax.random.key(0)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(self.depth))
        bound = parent.is_initializing() or parent.is_mutable_collection("intermediates")
        run = functools.partial(
            self._run_submodules if bound else self._run, parent, block, (mask, context), keys
        )
        # Two runs, not one: no gradient is computed through a run whose parameters are all frozen.
        if segment is not Segment.SUFFIX:
            x = run(x, range(n), train=False)
        if segment is not Segment.PREFIX:
            x = run(x, range(n, self.depth), train=train)
        return x

    def _run_submodules(
        self,
        parent: nn.Module,
        block: Block,
        others: tuple[Array | None, ...],
        keys: Array,
        x: Array,
        indices: range,
        *,
        train: bool,
    ) -> Array:
        """Run layers as submodules of `parent`, which initializes them and collects outputs."""
        for i in indices:
            layer = block.clone(parent=parent, name=f"blocks_{i}")
            if train and block.dropout:  # the same dropout as in `_run`
                assert layer.scope is not None
                layer.scope.rngs = {**layer.scope.rngs, "dropout": LazyRng.create(keys[i])}
            x = self.constrain(layer(x, *others, train=train), layers.RESIDUAL_AXES)
        return x

    def _run(
        self,
        parent: nn.Module,
        block: Block,
        others: tuple[Array | None, ...],
        keys: Array,
        x: Array,
        indices: range,
        *,
        train: bool,
    ) -> Array:
        """Run layers as a function of their parameters, by a loop or a scan."""
        params = [parent.variables["params"][f"blocks_{i}"] for i in indices]
        keys = keys[indices.start : indices.stop]

        def layer(x: Array, layer_params: Params, key: Array) -> Array:
            rngs = {"dropout": key}
            y = block.apply({"params": layer_params}, x, *others, train=train, rngs=rngs)
            return self.constrain(cast(Array, y), layers.RESIDUAL_AXES)

        scan = self.scan or (self.remat and xla_cpu.remat_needs_scan())
        if self.remat:
            # Inside a scan nothing can be merged across iterations, so no barrier is needed.
            layer = functools.partial(jax.checkpoint, prevent_cse=not scan)(layer)
        if scan and len(params) > 1:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
            return jax.lax.scan(lambda x, p: (layer(x, *p), None), x, (stacked, keys))[0]
        for i, layer_params in enumerate(params):
            x = layer(x, layer_params, keys[i])
        return x
