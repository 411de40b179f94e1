"""Settings that do not fit each other are errors before the first step."""

import pytest

from imgtune_jax.errors import UserError
from imgtune_jax.training import preflight
from imgtune_jax.training.experiment import build_experiment
from tests.debug_run import settings


@pytest.mark.parametrize("unlocked_layers", [0, 1])
def test_patch_dropout_before_frozen_layers_is_an_error(unlocked_layers):
    lock = {"lock.image": True, "lock.image_unlocked_layers": unlocked_layers}
    depth = {"model.image.depth": 2, "model.image.patch_dropout": 0.5}
    experiment = build_experiment(settings(**lock, **depth))
    with pytest.raises(UserError, match=r"patch_dropout = 0.5, but the first layers .* are locked"):
        preflight.check_experiment(experiment, is_new=False)


def test_patch_dropout_with_frozen_layers_after_it_is_allowed():
    changes = {"lock.patterns": ("image/blocks_0/.*",), "model.image.patch_dropout": 0.5}
    preflight.check_experiment(build_experiment(settings(**changes)), is_new=False)
