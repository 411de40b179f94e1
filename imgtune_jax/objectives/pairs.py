"""Reductions over all (image, text) pairs of a global batch, in blocks and over devices.

No array of shape [b b] is created, where b is the size of the global batch. Axis letters of a
block: n images, m texts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from imgtune_jax.partition import ACTIVATION_AXES
from imgtune_jax.types import PyTree

BLOCK_SIZE = 2**23  # pairs per block: 32 MiB of float32 logits

# block_fn(scalars, images, texts, image_sums, text_sums) -> (image_sums, text_sums). It adds the
# contributions of one block of pairs to the sums per image and to the sums per text.
BlockFn = Callable[[Any, Any, Any, Any, Any], tuple[Any, Any]]


def reduce_pairs(
    block_fn: BlockFn,
    scalars: PyTree,
    sides: tuple[PyTree, PyTree],
    sums: tuple[PyTree, PyTree],
    *,
    mesh: Mesh | None,
) -> tuple[PyTree, PyTree]:
    """Call `block_fn` on blocks that cover every (image, text) pair once; return the sums.

    `sides` is (images, texts), and `sums` holds the initial values of (image_sums, text_sums). All
    four are trees of [b ...] arrays. Every call of `block_fn` receives `scalars`, some rows of the
    images, and all or some rows of the texts. The order of the calls is unspecified. The last block
    is padded with image rows of zeros, whose mask is therefore False. These rows must not change
    the sums of other rows.

    If `mesh` shards the batch, each device always holds its shard of the images and of their sums.
    The shards of the texts and of their sums are passed around the ring of devices. The batch size
    must be a multiple of the number of shards.
    """
    axes = ACTIVATION_AXES["batch"]
    num_shards = (
        1 if mesh is None else functools.reduce(lambda n, axis: n * mesh.shape[axis], axes or (), 1)
    )
    if num_shards == 1:
        return _scan_blocks(functools.partial(block_fn, scalars), *sides, *sums)
    permutation = [(i, (i + 1) % num_shards) for i in range(num_shards)]

    def ring(
        scalars: PyTree, sides: tuple[PyTree, PyTree], sums: tuple[PyTree, PyTree]
    ) -> tuple[PyTree, PyTree]:
        """Reduce the pairs of one device's images with the texts of all devices."""
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
    """Call `block_fn` on blocks of image rows with all of `texts`; return both sums."""
    n, m = (jax.tree.leaves(side)[0].shape[0] for side in (images, texts))
    num_blocks = -(-n * m // BLOCK_SIZE)
    if num_blocks == 1:
        return block_fn(images, texts, image_sums, text_sums)
    rows_per_block = -(-n // num_blocks)

    def to_blocks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, rows_per_block * num_blocks - n)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(num_blocks, rows_per_block, *x.shape[1:])

    def scan_step(text_sums: PyTree, block: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        image_sums, text_sums = block_fn(block[0], texts, block[1], text_sums)
        return text_sums, image_sums

    blocks = jax.tree.map(to_blocks, (images, image_sums))
    text_sums, image_sums = jax.lax.scan(scan_step, text_sums, blocks)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], image_sums), text_sums
