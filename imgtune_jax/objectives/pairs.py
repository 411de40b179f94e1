"""All pairs of a global batch, a block at a time: no [b b] array, on one device or many."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from imgtune_jax.partition import ACTIVATION_AXES
from imgtune_jax.types import PyTree

BLOCK_SIZE = 2**23  # pairs in a block: 32 MiB of float32 logits

# visit(scalars, images, texts, image_sums, text_sums) -> (image_sums, text_sums) of one block.
BlockFn = Callable[[Any, Any, Any, Any, Any], tuple[Any, Any]]


def reduce_pairs(
    block_fn: BlockFn,
    scalars: PyTree,
    sides: tuple[PyTree, PyTree],
    sums: tuple[PyTree, PyTree],
    *,
    mesh: Mesh | None,
) -> tuple[PyTree, PyTree]:
    """Show `visit` each pair of an image and a text once; give back what it summed by side.

    Sides and sums are trees of [b ...] arrays, (images, texts). `visit` sees some rows of the
    images and all or some of the texts; it must not care for the order of its calls, and must leave
    its sums alone for rows of zeros, with which the last block is filled up.

    Under a mesh that cuts the batch, the images and their sums stay on their devices, and the texts
    travel around the ring of devices with theirs: a device holds its own part of the batch and one
    other's. The batch must divide over the devices.
    """
    axes = ACTIVATION_AXES["batch"]
    num_shards = (
        1 if mesh is None else functools.reduce(lambda n, a: n * mesh.shape[a], axes or (), 1)
    )
    if num_shards == 1:
        return _scan_blocks(functools.partial(block_fn, scalars), *sides, *sums)
    permutation = [(i, (i + 1) % num_shards) for i in range(num_shards)]

    def ring(
        scalars: PyTree, sides: tuple[PyTree, PyTree], sums: tuple[PyTree, PyTree]
    ) -> tuple[PyTree, PyTree]:
        """What one device does: its images meet the texts of every device in turn."""
        images, texts = sides

        def ring_step(carry: Any, _: None) -> tuple[Any, None]:
            texts, sums = carry
            image_sums, text_sums = _scan_blocks(
                functools.partial(block_fn, scalars), images, texts, *sums
            )
            texts, text_sums = jax.lax.ppermute((texts, text_sums), axes, permutation)
            return (texts, (image_sums, text_sums)), None

        (_, sums), _ = jax.lax.scan(ring_step, (texts, sums), length=num_shards)
        return sums

    by_batch = PartitionSpec(axes)
    specs = (PartitionSpec(), by_batch, by_batch)
    return jax.shard_map(ring, mesh=mesh, in_specs=specs, out_specs=by_batch)(scalars, sides, sums)


def _scan_blocks(
    block_fn: Callable[..., tuple[PyTree, PyTree]],
    images: PyTree,
    texts: PyTree,
    image_sums: PyTree,
    text_sums: PyTree,
) -> tuple[PyTree, PyTree]:
    """`visit` blocks of image rows against all of these texts."""
    n, m = (jax.tree.leaves(side)[0].shape[0] for side in (images, texts))
    blocks = -(-n * m // BLOCK_SIZE)
    if blocks == 1:
        return block_fn(images, texts, image_sums, text_sums)
    rows = -(-n // blocks)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, rows * blocks - n)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(blocks, rows, *x.shape[1:])

    def one(text_sums: PyTree, block: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        image_sums, text_sums = block_fn(block[0], texts, block[1], text_sums)
        return text_sums, image_sums

    text_sums, image_sums = jax.lax.scan(one, text_sums, jax.tree.map(cut, (images, image_sums)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], image_sums), text_sums
