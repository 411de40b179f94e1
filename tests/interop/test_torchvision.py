"""A converted ResNet has the outputs that tests/golden/interop_resnet.py saved."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from imgtune_jax import interop, models
from tests.golden import interop_resnet as script

FOLDER = Path(__file__).parents[1] / "golden"


def test_outputs_equal_those_of_torchvision(tmp_path):
    golden = np.load(FOLDER / "interop_resnet.npz")
    state = script.sample_state_dict(json.loads(str(golden["shapes"])))
    np.savez(tmp_path / "resnet.npz", **state)
    cfg = dict(name="resnet", stage_sizes=script.STAGE_SIZES, num_classes=script.NUM_CLASSES)
    params = interop.load_tower(dict(format="resnet", path=tmp_path / "resnet.npz"), cfg)
    tower, image = models.build_tower(cfg), jnp.asarray(script.sample_images())
    pooled = tower.apply({"params": params}, image, train=False).pooled
    # Folded norms round differently in each of 15 convolutions; values are of order 1.
    np.testing.assert_allclose(pooled, golden["pooled"], rtol=1e-4, atol=2e-5)
    logits = tower.apply({"params": params}, image, method="classify")
    np.testing.assert_allclose(logits, golden["logits"], rtol=1e-4, atol=2e-5)
