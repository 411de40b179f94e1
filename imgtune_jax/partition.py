"""The mesh, the one table of sharding rules, and the Partitioner that applies them.

The mesh is an argument everywhere: no ambient mesh, no context manager. Mesh axes are `data`
(batch only), `fsdp` (batch, and parameters at rest) and `tensor` (wide dimensions).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from imgtune_jax import config as config_lib
from imgtune_jax.param_tree import path_str
from imgtune_jax.types import Batch, PyTree

# Logical axes of activations -> mesh axes. The batch spans both data-like axes; the residual
# stream is otherwise replicated, so GSPMD gathers parameters rather than activations.
ACTIVATION_AXES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "embed": None,
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

# (regex found in a parameter's path, mesh axis of each dimension). The first match whose rank
# fits wins; what no rule fits has its largest divisible dimension laid over `fsdp`.
PARAM_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"/(q|k|v|fc1|vocabulary)/kernel$", ("fsdp", "tensor")),
    (r"/(out|fc2)/kernel$", ("tensor", "fsdp")),
    (r"/(q|k|v|fc1)/bias$", ("tensor",)),
    (r"/(token_embed|word_embeddings)/embedding$", ("tensor", "fsdp")),
)
MIN_FSDP_SIZE = 2**10  # smaller arrays are replicated: a gather would cost more than it saves


def make_mesh(
    cfg: config_lib.MeshConfig, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
    """A (data, fsdp, tensor) mesh over all devices.

    Raises ValueError when the axes' product is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) == 1 and known and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if any(s < 1 for s in sizes) or int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh data={cfg.data}, fsdp={cfg.fsdp}, tensor={cfg.tensor} does not lay out "
            f"{len(devices)} devices; wanted a product of {len(devices)} (one axis may be -1)"
        )
    return jax.make_mesh(
        tuple(sizes), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices
    )


@dataclass(frozen=True)
class Partitioner:
    """Says where every array of a program lives on the mesh."""

    mesh: jax.sharding.Mesh

    @property
    def replicated(self) -> NamedSharding:
        """On every device, whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch_sharding(self) -> NamedSharding:
        """First dimension over `data` and `fsdp`, the rest whole."""
        return NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))

    @property
    def num_batch_shards(self) -> int:
        """Number of parts a batch is cut into."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def check_batch_size(self, batch_size: int, what: str = "batch") -> None:
        """Raise ValueError unless `batch_size` divides over the devices, naming sizes that do."""
        n = self.num_batch_shards
        if batch_size % n:
            low, high = batch_size // n * n, -(-batch_size // n) * n
            would = f"{low} or {high}" if low else f"{high}"
            raise ValueError(f"{what} {batch_size} does not divide over {n} devices; {would} would")

    def constrain(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """Pin an activation's layout by logical axes; dimensions that do not divide stay whole."""
        wanted = [ACTIVATION_AXES[a] if a is not None else None for a in axes]
        return jax.lax.with_sharding_constraint(x, self._sharding(wanted, x.shape))

    def param_shardings(self, abstract: PyTree) -> PyTree:
        """NamedSharding of every leaf of a tree of arrays or abstract arrays, by path and shape."""
        return jax.tree_util.tree_map_with_path(
            lambda path, x: self._param_sharding(path_str(path), x.shape), abstract
        )

    def put_batch(self, local: Mapping[str, np.ndarray]) -> Batch:
        """This host's part of a batch -> the global, sharded Batch."""
        arrays = {
            name: jax.make_array_from_process_local_data(self.batch_sharding, np.asarray(value))
            for name, value in local.items()
            if name in Batch.__dataclass_fields__
        }
        return Batch(**arrays)

    def local_rows(self, x: jax.Array) -> np.ndarray:
        """This host's rows of an array that is laid out by batch: the inverse of `put`."""
        shards = {s.index[0].start or 0: s.data for s in x.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

    def shard_rows(self, whole: np.ndarray) -> jax.Array:
        """An array that every host holds whole -> sharded by its first dimension."""
        return jax.make_array_from_callback(
            whole.shape, self.batch_sharding, lambda index: whole[index]
        )

    def _param_sharding(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
        for pattern, axes in PARAM_RULES:
            if re.search(pattern, name) and len(axes) == len(shape):
                return self._sharding(axes, shape)
        largest: list[str | None] = [None] * len(shape)
        n = self.mesh.shape["fsdp"]
        fits = [i for i, size in enumerate(shape) if size % n == 0]
        if fits and int(np.prod(shape)) >= MIN_FSDP_SIZE:
            largest[max(fits, key=lambda i: shape[i])] = "fsdp"
        return self._sharding(largest, shape)

    def _sharding(self, axes: Sequence[Any], shape: tuple[int, ...]) -> NamedSharding:
        spec = []
        for axis, size in zip(axes, shape, strict=True):
            names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
            parts = int(np.prod([self.mesh.shape[n] for n in names]))
            spec.append(axis if names and size % parts == 0 else None)
        return NamedSharding(self.mesh, PartitionSpec(*spec))
