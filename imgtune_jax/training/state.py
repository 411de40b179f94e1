"""Parameters and TrainStates on the mesh, as arrays or as abstract arrays (ShapeDtypeStructs)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from imgtune_jax import param_tree
from imgtune_jax.errors import UserError
from imgtune_jax.partition import Partitioner
from imgtune_jax.training.optim import Optimizer
from imgtune_jax.types import Params, PyTree, TrainState


def init_params(
    init: Callable[[jax.Array], Params],
    key: jax.Array,
    partitioner: Partitioner,
    pretrained: Mapping[str, Params],
) -> Params:
    """Return `init(key)` laid out on the mesh, with some sub-trees replaced by `pretrained` ones.

    `pretrained` maps a top-level name ("image", "text") to a tree of NumPy arrays. The other
    components are initialized randomly. Raises UserError listing every path that is missing,
    unknown or of another shape than the model's.
    """
    abstract = jax.eval_shape(init, key)
    _check_pretrained(abstract, pretrained)
    shardings = partitioner.param_shardings(abstract)
    sampled = [name for name in abstract if name not in pretrained]

    def sample(key: jax.Array) -> Params:
        params = init(key)
        return {name: params[name] for name in sampled}

    params = jax.jit(sample, out_shardings={n: shardings[n] for n in sampled})(key)
    for name, tree in pretrained.items():
        cast = jax.tree.map(lambda x, a: np.asarray(x, a.dtype), tree, abstract[name])
        params[name] = jax.device_put(cast, shardings[name])
    return params


def _check_pretrained(abstract: Params, pretrained: Mapping[str, Params]) -> None:
    """Raise UserError listing every path of `pretrained` that does not fit the model."""
    problems = []
    for name, tree in pretrained.items():
        expected = param_tree.flatten(abstract.get(name, {}))
        got = param_tree.flatten(tree)
        problems += [f"{name}/{p} is missing" for p in sorted(expected.keys() - got.keys())]
        problems += [
            f"{name}/{p} is unknown to the model" for p in sorted(got.keys() - expected.keys())
        ]
        problems += [
            f"{name}/{p} has shape {got[p].shape}; expected {expected[p].shape}, as in the model"
            for p in sorted(expected.keys() & got.keys())
            if tuple(got[p].shape) != tuple(expected[p].shape)
        ]
    if problems:
        raise UserError("pretrained weights do not fit the model:\n  " + "\n  ".join(problems))


def with_shardings(abstract: PyTree, partitioner: Partitioner) -> PyTree:
    """Add a sharding, chosen by path and shape, to each ShapeDtypeStruct of a tree."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        partitioner.param_shardings(abstract),
    )


def abstract_train_state(
    trainable: PyTree, optimizer: Optimizer, partitioner: Partitioner, *, with_ema: bool
) -> TrainState:
    """Return the TrainState of these parameters as ShapeDtypeStructs with shardings."""
    shapes = jax.eval_shape(lambda p: _initial_state(p, optimizer, with_ema), trainable)
    return with_shardings(shapes, partitioner)


def create_train_state(trainable: Params, optimizer: Optimizer, target: TrainState) -> TrainState:
    """Create the TrainState of step 0, with the shardings of an `abstract_train_state`."""
    with_ema = target.ema_params is not None
    shardings = jax.tree.map(lambda x: x.sharding, target)
    create = jax.jit(lambda p: _initial_state(p, optimizer, with_ema), out_shardings=shardings)
    return create(trainable)


def _initial_state(trainable: Params, optimizer: Optimizer, with_ema: bool) -> TrainState:
    ema = jax.tree.map(jnp.copy, trainable) if with_ema else None
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.tx.init(trainable), ema)


def eval_params(state: TrainState, frozen: Params) -> Params:
    """Return all parameters for evaluation: frozen and trainable ones.

    If the state has an exponential moving average (EMA), it replaces the trainable parameters.
    """
    return param_tree.merge(state.params if state.ema_params is None else state.ema_params, frozen)


def non_finite_paths(tree: PyTree) -> list[str]:
    """Return the paths of arrays with a NaN or an infinity, such as "params/logit_scale"."""
    is_finite = [bool(x) for x in jax.device_get(_finite_leaves(tree))]
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, ok in zip(paths, is_finite, strict=True)
        if not ok
    ]


@jax.jit
def _finite_leaves(tree: PyTree) -> list[jax.Array]:
    """Return, for each array of a tree, whether all its numbers are finite."""
    return [
        jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.array(True)
        for x in jax.tree.leaves(tree)
    ]
