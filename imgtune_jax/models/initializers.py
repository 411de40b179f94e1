"""How parameters are drawn: each is declared with its law, and a whole component is drawn at once.

One vectorised draw of standard normals compiles many times faster than one draw a parameter, and
declaring a law costs nothing when a model is only traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array

from imgtune_jax.types import Params

Initializer = Callable[..., Any]
MAX_DRAW = 2**27  # elements drawn together: 512 MiB


class Law(struct.PyTreeNode, nn.meta.AxisMetadata[Any]):
    """A parameter in waiting: normal with this mean and standard deviation."""

    value: Any
    mean: float = struct.field(pytree_node=False)
    std: float = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        """The placeholder, which has the parameter's shape."""
        return self.value

    def replace_boxed(self, val: Any) -> Law:
        """The same law of another placeholder."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Any:
        """Unchanged: a law has no axis names."""
        del index, params
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Any:
        """Unchanged, as above."""
        del index, params
        return self


def normal(std: float, *, mean: float = 0.0) -> Initializer:
    """Normal with this standard deviation."""

    def declare(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Law:
        del key
        return Law(jnp.zeros(shape, dtype), mean, std)

    return declare


def fan_scaled_normal(variance: Callable[[int, int], float]) -> Initializer:
    """Normal whose variance is a function of a kernel's (fan_in, fan_out)."""

    def declare(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Law:
        window = int(np.prod(shape[:-2]))
        std = variance(window * shape[-2], window * shape[-1]) ** 0.5
        return normal(std)(key, shape, dtype)

    return declare


ZEROS = normal(0.0)
ONES = normal(0.0, mean=1.0)
XAVIER_NORMAL = fan_scaled_normal(
    lambda fan_in, fan_out: 2 / (fan_in + fan_out)
)  # Glorot and Bengio, 2010
LECUN_NORMAL = fan_scaled_normal(lambda fan_in, fan_out: 1 / fan_in)
HE_NORMAL = fan_scaled_normal(lambda fan_in, fan_out: 2 / fan_in)  # 1502.01852, in front of a ReLU


def declare(module: nn.Module, *inputs: Any) -> Params:
    """The laws of a module's parameters, on abstract inputs; nothing is computed."""

    def run(*inputs: Any) -> Any:
        return module.init(jax.random.key(0), *inputs, train=False)

    return cast(Params, jax.eval_shape(run, *inputs).get("params", {}))


def abstract_params(laws: Params) -> Params:
    """The abstract parameters that follow the laws."""
    return jax.tree.map(lambda law: law.value, laws, is_leaf=lambda x: isinstance(x, Law))


def sample_params(laws: Params, key: jax.Array) -> Params:
    """Float32 parameters that follow the laws. Values depend on the whole tree, not on a path."""
    leaves, structure = jax.tree.flatten(laws, is_leaf=lambda x: isinstance(x, Law))
    random = [i for i, law in enumerate(leaves) if law.std]
    drawn: dict[int, Array] = {}
    while random:
        group = _first_group(random, leaves)
        random = random[len(group) :]
        key, own = jax.random.split(key)
        noise = jax.random.normal(own, (sum(leaves[i].value.size for i in group),), jnp.float32)
        parts = jnp.split(noise, np.cumsum([leaves[i].value.size for i in group])[:-1])
        drawn |= dict(zip(group, parts, strict=True))
    values = [
        law.mean + law.std * drawn[i].reshape(law.value.shape)
        if i in drawn
        else jnp.full(law.value.shape, law.mean, jnp.float32)
        for i, law in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, values)


def _first_group(indexes: list[int], leaves: list[Law]) -> list[int]:
    """As many parameters as fit one draw, at least one."""
    total, group = 0, []
    for i in indexes:
        total += leaves[i].value.size
        if group and total > MAX_DRAW:
            break
        group.append(i)
    return group
