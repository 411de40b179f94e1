"""Models with random weights in folders of `TunedModel.save`, and a folder of photos."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgtune_jax import api
from imgtune_jax.training.experiment import build_experiment
from tests import debug_run

ROOT = Path(__file__).parents[2]


def save_model(folder, **changes):
    """Write the debug config's model with random weights to a folder; return the folder."""
    previous_folder = Path.cwd()
    os.chdir(ROOT)
    try:
        experiment = build_experiment(debug_run.settings(**changes))
        predictor = experiment.predictor(experiment.init_params(), use_memo=False)
        return api.TunedModel(predictor, experiment, -1).save(folder)
    finally:
        os.chdir(previous_folder)


@pytest.fixture(scope="session")
def softmax_model(tmp_path_factory):
    """The folder of a model without a logit bias."""
    return save_model(tmp_path_factory.mktemp("softmax") / "model")


@pytest.fixture(scope="session")
def sigmoid_model(tmp_path_factory):
    """The folder of a model with a logit bias, as in SigLIP."""
    return save_model(
        tmp_path_factory.mktemp("sigmoid") / "model", **{"model.logit_bias_init": -9.0}
    )


@pytest.fixture
def photos(tmp_path):
    """A folder of two images, one bad file and hidden files; the current folder is its parent."""
    folder = tmp_path / "photos"
    (folder / ".trash").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", ".trash/c.png")):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "bad.png").write_bytes(b"not an image")
    (folder / "._a.png").write_bytes(b"resource fork")
    (folder / "folder.png").mkdir()
    return folder
