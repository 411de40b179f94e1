"""The mesh, the table of sharding rules, and the Partitioner that applies them.

The mesh is always an argument: there is no global mesh and no context manager. The mesh axis `data`
shards the batch only. `fsdp` (fully sharded data parallelism) shards the batch and the stored
parameters. `tensor` shards attention heads, the MLP's hidden layer and the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Bool

from imgtune_jax import config as config_lib
from imgtune_jax.errors import UserError
from imgtune_jax.param_tree import path_str
from imgtune_jax.types import Batch, PyTree

# Logical axes of activations -> mesh axes. The length and width of the residual stream are
# replicated, so that XLA's partitioner (GSPMD) gathers parameters rather than activations.
ACTIVATION_AXES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "embed": None,
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

# (regex searched in a parameter's path, mesh axis of each dimension). The first match with as many
# dimensions as the parameter wins. Without a match, `fsdp` shards the largest dimension that it
# divides.
PARAM_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"/(q|k|v|fc1|vocabulary)/kernel$", ("fsdp", "tensor")),
    (r"/(out|fc2)/kernel$", ("tensor", "fsdp")),
    (r"/(q|k|v|fc1|vocabulary)/bias$", ("tensor",)),
    (r"/(token_embed|word_embeddings)/embedding$", ("tensor", "fsdp")),
)
# Number of elements below which a parameter without a rule is replicated, since gathering it would
# cost more than sharding it saves.
MIN_FSDP_SIZE = 2**10


def make_mesh(
    cfg: config_lib.MeshConfig, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
    """Make a (data, fsdp, tensor) mesh over all devices.

    Raises UserError if the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) == 1 and known and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if any(s < 1 for s in sizes) or int(np.prod(sizes)) != len(devices):
        raise UserError(
            f"config.mesh = (data={cfg.data}, fsdp={cfg.fsdp}, tensor={cfg.tensor}) on "
            f"{len(devices)} devices; expected a product of {len(devices)}; one axis may be -1"
        )
    return jax.make_mesh(
        tuple(sizes), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices
    )


@dataclass(frozen=True)
class Partitioner:
    """Shardings of batches, activations and parameters on a mesh."""

    mesh: jax.sharding.Mesh

    @property
    def replicated(self) -> NamedSharding:
        """Sharding of an array that every device holds in full."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch_sharding(self) -> NamedSharding:
        """Sharding of the first dimension over `data` and `fsdp`; the others are replicated."""
        return NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))

    @property
    def num_batch_shards(self) -> int:
        """Number of shards of a batch."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def check_batch_size(self, batch_size: int, name: str = "batch") -> None:
        """Raise UserError unless `batch_size` is a multiple of the number of batch shards.

        The error calls the batch `name` and suggests sizes that fit.
        """
        n = self.num_batch_shards
        if batch_size % n:
            low, high = batch_size // n * n, -(-batch_size // n) * n
            fitting = f"{low} or {high}" if low else f"{high}"
            raise UserError(
                f"{name} size {batch_size} does not divide over {n} devices; set it to {fitting}"
            )

    def constrain(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """Constrain an activation's sharding by logical axes.

        A dimension that its mesh axes do not divide is replicated.
        """
        mesh_axes = [ACTIVATION_AXES[a] if a is not None else None for a in axes]
        return jax.lax.with_sharding_constraint(x, self._sharding(mesh_axes, x.shape))

    def param_shardings(self, abstract: PyTree) -> PyTree:
        """Return the NamedSharding of every leaf of a pytree of arrays, by path and shape."""
        return jax.tree_util.tree_map_with_path(
            lambda path, x: self._param_sharding(path_str(path), x.shape), abstract
        )

    @cached_property
    def _hosts_of_shards(self) -> list[list[int]]:
        """The hosts whose devices hold each shard of a batch, increasing."""
        devices = self.mesh.devices.reshape(self.num_batch_shards, -1)
        return [sorted({device.process_index for device in row}) for row in devices]

    @cached_property
    def _host_shards(self) -> list[int]:
        """The shards of a batch that devices of this host hold, increasing."""
        host = jax.process_index()
        return [i for i, hosts in enumerate(self._hosts_of_shards) if host in hosts]

    def host_rows(self, batch_size: int) -> tuple[int, ...] | None:
        """Return the rows of a batch that devices of this host hold; None if they hold all.

        Hosts that share a `tensor` group have the same rows. Raises UserError unless `batch_size`
        is a multiple of the number of batch shards.
        """
        if not self.mesh.is_multi_process:
            return None
        self.check_batch_size(batch_size)
        size = batch_size // self.num_batch_shards
        return tuple(i * size + row for i in self._host_shards for row in range(size))

    def written_rows(self, num_rows: int) -> Bool[np.ndarray, " n"]:
        """Return which of this host's rows it writes to disk: each row is written by one host."""
        host, size = jax.process_index(), num_rows // len(self._host_shards)
        return np.repeat([self._hosts_of_shards[i][0] == host for i in self._host_shards], size)

    def put_batch(self, local: Mapping[str, np.ndarray]) -> Batch:
        """Make the global, sharded Batch from this host's rows; drop keys that Batch lacks."""
        arrays = {
            name: self._put_rows(np.asarray(value))
            for name, value in local.items()
            if name in Batch.__dataclass_fields__
        }
        return Batch(**arrays)

    def _put_rows(self, local: np.ndarray) -> jax.Array:
        """Make a global array with `batch_sharding` from this host's rows."""
        if not self.mesh.is_multi_process:
            return jax.device_put(local, self.batch_sharding)
        size = len(local) // len(self._host_shards)

        def read(index: Any) -> np.ndarray:
            start = self._host_shards.index((index[0].start or 0) // size) * size
            return local[start : start + size]

        shape = (size * self.num_batch_shards, *local.shape[1:])
        return jax.make_array_from_callback(shape, self.batch_sharding, read)

    def local_rows(self, x: jax.Array) -> np.ndarray:
        """Return this host's rows of an array with `batch_sharding`: the inverse of `put_batch`."""
        shards = {s.index[0].start or 0: s.data for s in x.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

    def shard_rows(self, array: np.ndarray) -> jax.Array:
        """Shard the first dimension of an array that every host holds in full."""
        return jax.make_array_from_callback(
            array.shape, self.batch_sharding, lambda index: array[index]
        )

    def _param_sharding(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """Return a parameter's sharding by PARAM_RULES, or over `fsdp` if no rule matches."""
        for pattern, axes in PARAM_RULES:
            if re.search(pattern, path) and len(axes) == len(shape):
                return self._sharding(axes, shape)
        default_axes: list[str | None] = [None] * len(shape)
        n = self.mesh.shape["fsdp"]
        divisible = [i for i, size in enumerate(shape) if size % n == 0]
        if divisible and int(np.prod(shape)) >= MIN_FSDP_SIZE:
            default_axes[max(divisible, key=lambda i: shape[i])] = "fsdp"
        return self._sharding(default_axes, shape)

    def _sharding(self, axes: Sequence[Any], shape: tuple[int, ...]) -> NamedSharding:
        """Return the sharding over mesh axes; drop an axis that does not divide its dimension."""
        spec = []
        for axis, size in zip(axes, shape, strict=True):
            names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
            num_shards = int(np.prod([self.mesh.shape[n] for n in names]))
            spec.append(axis if names and size % num_shards == 0 else None)
        return NamedSharding(self.mesh, PartitionSpec(*spec))
