"""Top-k along the last axis. Each device computes it for the rows that it stores."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int


def _top_k(x: Float[Array, "*b v"], k: int) -> tuple[Float[Array, "*b {k}"], Int[Array, "*b {k}"]]:
    """Return the k largest values of each row and their indices.

    XLA does not partition `jax.lax.top_k` and would gather all rows on every device.
    """
    values, index = jax.lax.top_k(x, k)
    return values, index


def _row_sharding(mesh: Mesh, x: Any) -> NamedSharding:
    """Return the sharding of `x` with its last dimension unsharded."""
    spec = tuple(x.sharding.spec) + (None,) * (len(x.shape) - len(x.sharding.spec))
    return NamedSharding(mesh, PartitionSpec(*spec[:-1], None))


def _infer_sharding(k: int, mesh: Mesh, operands: Any, results: Any) -> tuple[NamedSharding, ...]:
    return (_row_sharding(mesh, operands[0]),) * 2


def _partition(k: int, mesh: Mesh, operands: Any, results: Any) -> tuple[Any, ...]:
    sharding = _row_sharding(mesh, operands[0])
    return mesh, lambda x: _top_k(x, k), (sharding, sharding), (sharding,)


top_k = custom_partitioning(_top_k, static_argnums=(1,))
top_k.def_partition(
    partition=_partition,
    infer_sharding_from_operands=_infer_sharding,
    sharding_rule="... v -> ... m, ... m",
)
