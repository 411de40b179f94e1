"""Normal initializers, and sampling of all parameters of a component at once.

As with any Linen initializer, `module.init(key, x)` returns plain float32 arrays. In addition, each
initializer can state its distribution. `ModelComponents.init` collects the distributions of a
component (`param_specs`) and samples all of them in one call (`sample_params`), since one large
sample compiles many times faster than one sample per parameter.

Axis letters: i inputs and o outputs of a kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array

from imgtune_jax.types import Params

MAX_SAMPLE_SIZE = 2**27  # elements sampled in one call: 512 MiB

# `param` declares a NormalSpec instead of an array if the module has an RNG stream of this name.
SPEC_STREAM = "param_specs"


class NormalSpec(struct.PyTreeNode, nn.meta.AxisMetadata[Any]):
    """The distribution of a parameter, normal(mean, std); `value` is a placeholder."""

    value: Any
    mean: float = struct.field(pytree_node=False)
    std: float = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        """Return the placeholder, which has the parameter's shape and type."""
        return self.value

    def replace_boxed(self, val: Any) -> NormalSpec:
        """Return the same distribution with another placeholder."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Any:
        """Return self: a spec has no axis names."""
        del index, params
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Any:
        """Return self: a spec has no axis names."""
        del index, params
        return self


class Initializer(Protocol):
    """A Linen initializer that can also state its distribution."""

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = ...) -> Array:
        """Sample an array."""
        ...

    def spec(self, shape: tuple[int, ...]) -> NormalSpec:
        """Return the distribution of a float32 parameter of that shape."""
        ...


@dataclasses.dataclass(frozen=True)
class Normal:
    """Normal with this mean and standard deviation; constant if `std` is 0."""

    std: float
    mean: float = 0.0

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        """Sample an array."""
        if not self.std:
            return jnp.full(shape, self.mean, dtype)
        return self.mean + self.std * jax.random.normal(key, shape, dtype)

    def spec(self, shape: tuple[int, ...]) -> NormalSpec:
        """Return the distribution of a float32 parameter of that shape."""
        return NormalSpec(jnp.zeros(shape, jnp.float32), self.mean, self.std)


@dataclasses.dataclass(frozen=True)
class FanScaledNormal:
    """Normal with mean 0 whose variance is a function of a kernel's (fan_in, fan_out)."""

    variance: Callable[[int, int], float]

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        """Sample a kernel of shape [… i o]; axes before the last two are a convolution's."""
        return self._normal(shape)(key, shape, dtype)

    def spec(self, shape: tuple[int, ...]) -> NormalSpec:
        """Return the distribution of a float32 kernel of that shape."""
        return self._normal(shape).spec(shape)

    def _normal(self, shape: tuple[int, ...]) -> Normal:
        window = int(np.prod(shape[:-2]))
        return Normal(self.variance(window * shape[-2], window * shape[-1]) ** 0.5)


ZEROS = Normal(0.0)
ONES = Normal(0.0, mean=1.0)
# Glorot and Bengio, 2010
XAVIER_NORMAL = FanScaledNormal(lambda fan_in, fan_out: 2 / (fan_in + fan_out))
LECUN_NORMAL = FanScaledNormal(lambda fan_in, fan_out: 1 / fan_in)
HE_NORMAL = FanScaledNormal(
    lambda fan_in, fan_out: 2 / fan_in
)  # 1502.01852, for layers before a ReLU


def param(module: nn.Module, name: str, initializer: Initializer, shape: tuple[int, ...]) -> Array:
    """Declare and return a float32 parameter of a module. Modules call it, not `module.param`.

    If the module has an RNG stream `SPEC_STREAM`, the parameter is `initializer.spec(shape)`
    instead of a sample (see `param_specs`).
    """
    if module.has_rng(SPEC_STREAM):
        return cast(Array, module.param(name, lambda key: initializer.spec(shape)))
    if module.has_variable("params", name):
        # Linen traces the initializer each time, to check the shape. Zeros are traced faster.
        return module.param(name, lambda key: jnp.zeros(shape, jnp.float32))
    return module.param(name, initializer, shape, jnp.float32)


def param_specs(module: nn.Module, *inputs: Any) -> Params:
    """Return the NormalSpec of each parameter of a module, given abstract inputs.

    No array is computed. Every parameter of the module must be declared by `param`.
    """

    def run(*inputs: Any) -> Any:
        key = jax.random.key(0)
        return module.init({"params": key, SPEC_STREAM: key}, *inputs)

    return cast(Params, jax.eval_shape(run, *inputs).get("params", {}))


def abstract_params(specs: Params) -> Params:
    """Return the abstract parameters that have these distributions."""
    return jax.tree.map(lambda spec: spec.value, specs, is_leaf=_is_spec)


def sample_params(specs: Params, key: jax.Array) -> Params:
    """Sample float32 parameters. Adding a parameter to the tree can change all other values."""
    leaves, structure = jax.tree.flatten(specs, is_leaf=_is_spec)
    remaining = [i for i, spec in enumerate(leaves) if spec.std]
    noise: dict[int, Array] = {}
    while remaining:
        group = _next_group(remaining, leaves)
        remaining = remaining[len(group) :]
        key, group_key = jax.random.split(key)
        sizes = [leaves[i].value.size for i in group]
        flat = jax.random.normal(group_key, (sum(sizes),), jnp.float32)
        noise |= dict(zip(group, jnp.split(flat, np.cumsum(sizes)[:-1]), strict=True))
    values = [
        spec.mean + spec.std * noise[i].reshape(spec.value.shape)
        if i in noise
        else jnp.full(spec.value.shape, spec.mean, jnp.float32)
        for i, spec in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, values)


def _is_spec(x: Any) -> bool:
    return isinstance(x, NormalSpec)


def _next_group(indices: list[int], leaves: list[NormalSpec]) -> list[int]:
    """Return the first indices with at most MAX_SAMPLE_SIZE elements in total, at least one."""
    total, group = 0, []
    for i in indices:
        total += leaves[i].value.size
        if group and total > MAX_SAMPLE_SIZE:
            break
        group.append(i)
    return group
