"""The mesh, and the shardings of batches and parameters."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from imgtune_jax import config
from imgtune_jax.partition import Partitioner, make_mesh


def build_partitioner(data, fsdp, tensor):
    return Partitioner(make_mesh(config.MeshConfig(data, fsdp, tensor)))


def test_minus_one_takes_the_remaining_devices():
    assert dict(make_mesh(config.MeshConfig(-1, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (-1, 3, 1), (16, 1, 1)])
def test_mesh_error_names_the_number_of_devices(sizes):
    with pytest.raises(ValueError, match="on 8 devices; expected a product of 8"):
        make_mesh(config.MeshConfig(*sizes))


def test_batch_size_error_names_sizes_that_fit():
    message = "batch size 100 does not divide over 8 devices; set it to 96 or 104"
    with pytest.raises(ValueError, match=message):
        build_partitioner(8, 1, 1).check_batch_size(100)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("image/blocks_0/attn/q/kernel", (64, 64), P("fsdp", "tensor")),
        ("image/blocks_0/mlp/fc2/kernel", (256, 64), P("tensor", "fsdp")),
        ("opt/0/mu/image/blocks_0/mlp/fc1/kernel", (64, 256), P("fsdp", "tensor")),
        ("image/blocks_0/attn/q/kernel", (63, 64), P(None, "tensor")),
        ("image/patch_embed/kernel", (16, 16, 3, 64), P(None, None, None, "fsdp")),
        ("image/norm/scale", (64,), P(None)),
        ("logit_scale", (), P()),
    ],
)
def test_parameters_are_sharded_by_path_and_shape(path, shape, expected):
    tree = {}
    node = tree
    *parents, leaf = path.split("/")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = jax.ShapeDtypeStruct(shape, np.float32)
    (sharding,) = jax.tree.leaves(build_partitioner(2, 2, 2).param_shardings(tree))
    assert sharding.spec == expected


def test_put_batch_shards_rows_in_order_and_local_rows_undoes_it():
    partitioner = build_partitioner(4, 2, 1)
    image = np.arange(16 * 2 * 2 * 3, dtype=np.uint8).reshape(16, 2, 2, 3)
    batch = partitioner.put_batch(
        {"image": image, "example_mask": np.ones(16, bool), "index": np.arange(16)}
    )
    np.testing.assert_array_equal(batch.image, image)
    assert len(batch.image.sharding.device_set) == 8
    assert batch.image.addressable_shards[0].data.shape == (2, 2, 2, 3)
    np.testing.assert_array_equal(partitioner.local_rows(batch.image), image)
