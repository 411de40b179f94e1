"""From a model and pretrained towers to sharded, split parameters and their TrainState."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from imgtune_jax import param_tree
from imgtune_jax.partition import Partitioner
from imgtune_jax.training.optim import Optimizer
from imgtune_jax.types import Params, PyTree, TrainState


def init_params(
    init: Callable[[jax.Array], Params],
    key: jax.Array,
    partitioner: Partitioner,
    pretrained: Mapping[str, Params],
) -> Params:
    """Parameters laid out on the mesh: `init(key)`, with whole sub-trees taken from `pretrained`.

    `pretrained` maps a top-level name ("image", "text") to a tree of NumPy arrays. Only what is not
    pretrained is drawn. Raises ValueError listing every path that is missing, unknown or of another
    shape than the model's.
    """
    abstract = jax.eval_shape(init, key)
    _check_pretrained(abstract, pretrained)
    shardings = partitioner.param_shardings(abstract)
    drawn = [name for name in abstract if name not in pretrained]

    def draw(key: jax.Array) -> Params:
        params = init(key)
        return {name: params[name] for name in drawn}

    params = jax.jit(draw, out_shardings={n: shardings[n] for n in drawn})(key)
    for name, tree in pretrained.items():
        cast = jax.tree.map(lambda x, a: np.asarray(x, a.dtype), tree, abstract[name])
        params[name] = jax.device_put(cast, shardings[name])
    return params


def _check_pretrained(abstract: Params, pretrained: Mapping[str, Params]) -> None:
    problems = []
    for name, tree in pretrained.items():
        wanted = param_tree.flatten(abstract.get(name, {}))
        got = param_tree.flatten(tree)
        problems += [f"{name}/{p} is missing" for p in sorted(wanted.keys() - got.keys())]
        problems += [
            f"{name}/{p} is unknown to the model" for p in sorted(got.keys() - wanted.keys())
        ]
        problems += [
            f"{name}/{p} has shape {got[p].shape}; the model wants {wanted[p].shape}"
            for p in sorted(wanted.keys() & got.keys())
            if tuple(got[p].shape) != tuple(wanted[p].shape)
        ]
    if problems:
        raise ValueError("pretrained weights do not fit the model:\n  " + "\n  ".join(problems))


@dataclass(frozen=True)
class StateFactory:
    """Builds TrainStates, real and abstract, with their shardings."""

    optimizer: Optimizer
    partitioner: Partitioner
    with_ema: bool

    def create(self, trainable: Params) -> TrainState:
        """Step 0, with the optimizer's state laid out as the parameters are."""
        abstract = self.abstract(jax.eval_shape(lambda p: p, trainable))
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        return jax.jit(self._make, out_shardings=shardings)(trainable)

    def abstract(self, trainable: PyTree) -> TrainState:
        """ShapeDtypeStructs with shardings: the target of a restore."""
        shapes = jax.eval_shape(self._make, trainable)
        shardings = self.partitioner.param_shardings(shapes)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )

    def _make(self, trainable: Params) -> TrainState:
        ema = jax.tree.map(jnp.copy, trainable) if self.with_ema else None
        return TrainState(
            jnp.zeros((), jnp.int32), trainable, self.optimizer.tx.init(trainable), ema
        )


def eval_params(state: TrainState, frozen: Params) -> Params:
    """The parameters to judge and use: the moving average where there is one, and the frozen."""
    return param_tree.merge(state.params if state.ema_params is None else state.ema_params, frozen)
