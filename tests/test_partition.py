"""The mesh and where arrays live on it."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from imgtune_jax import config
from imgtune_jax.partition import Partitioner, make_mesh


def partitioner(data, fsdp, tensor):
    return Partitioner(make_mesh(config.MeshConfig(data, fsdp, tensor)))


def test_minus_one_takes_the_remaining_devices():
    assert dict(make_mesh(config.MeshConfig(-1, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (-1, 3, 1), (16, 1, 1)])
def test_a_mesh_that_does_not_fit_says_how_many_devices_there_are(sizes):
    with pytest.raises(ValueError, match="8 devices"):
        make_mesh(config.MeshConfig(*sizes))


def test_batch_size_error_names_sizes_that_fit():
    with pytest.raises(ValueError, match="batch 100 does not divide over 8 devices; 96 or 104"):
        partitioner(8, 1, 1).check_batch_size(100)


@pytest.mark.parametrize(
    ("path", "shape", "wanted"),
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
def test_parameters_are_laid_out_by_path_and_shape(path, shape, wanted):
    tree = {}
    node = tree
    *parents, leaf = path.split("/")
    for part in parents:
        node = node.setdefault(part, {})
    node[leaf] = jax.ShapeDtypeStruct(shape, np.float32)
    (sharding,) = jax.tree.leaves(partitioner(2, 2, 2).param_shardings(tree))
    assert sharding.spec == wanted


def test_put_shards_the_batch_and_keeps_its_order():
    part = partitioner(4, 2, 1)
    image = np.arange(16 * 2 * 2 * 3, dtype=np.uint8).reshape(16, 2, 2, 3)
    batch = part.put_batch(
        {"image": image, "example_mask": np.ones(16, bool), "index": np.arange(16)}
    )
    np.testing.assert_array_equal(batch.image, image)
    assert len(batch.image.sharding.device_set) == 8
    assert batch.image.addressable_shards[0].data.shape == (2, 2, 2, 3)
