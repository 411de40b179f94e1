"""The largest of every row, found where the row lives."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int


def _top_k(x: Float[Array, "*b v"], k: int) -> tuple[Float[Array, "*b {k}"], Int[Array, "*b {k}"]]:
    """`jax.lax.top_k`, which XLA would not split: it would gather all rows on every device."""
    values, index = jax.lax.top_k(x, k)
    return values, index


def _layout(mesh: Mesh, x: Any) -> NamedSharding:
    """As `x` lies, with the last dimension whole."""
    spec = tuple(x.sharding.spec) + (None,) * (len(x.shape) - len(x.sharding.spec))
    return NamedSharding(mesh, PartitionSpec(*spec[:-1], None))


def _outputs(k: int, mesh: Mesh, operands: Any, results: Any) -> tuple[NamedSharding, ...]:
    return (_layout(mesh, operands[0]),) * 2


def _partition(k: int, mesh: Mesh, operands: Any, results: Any) -> tuple[Any, ...]:
    layout = _layout(mesh, operands[0])
    return mesh, lambda x: _top_k(x, k), (layout, layout), (layout,)


top_k = custom_partitioning(_top_k, static_argnums=(1,))
top_k.def_partition(
    partition=_partition,
    infer_sharding_from_operands=_outputs,
    sharding_rule="... v -> ... m, ... m",
)
