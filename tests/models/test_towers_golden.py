"""Outputs of the towers are those of `models.TOWERS_VERSION`, on which cached features depend."""

import json

import pytest

from imgtune_jax import models
from tests.golden import towers_outputs


@pytest.fixture(scope="module")
def outputs():
    return towers_outputs.outputs()


@pytest.fixture(scope="module")
def golden():
    return json.loads(towers_outputs.GOLDEN.read_text())


def test_changed_tower_output_needs_another_version(outputs, golden):
    assert golden["version"] == models.TOWERS_VERSION
    assert golden["outputs"].keys() == outputs.keys()
    changed = towers_outputs.differing(golden["outputs"], outputs)
    assert not changed, (
        "increase TOWERS_VERSION in models/build.py, then run: "
        "python -m tests.golden.towers_outputs"
    )


def test_every_tower_has_a_golden_output():
    names = {
        cfg["name"]
        for towers in (towers_outputs.IMAGE_TOWERS, towers_outputs.TEXT_TOWERS)
        for cfg in towers.values()
    }
    assert names == models.TOWERS.keys()


def test_a_small_change_of_an_output_is_seen(outputs):
    for name, values in outputs.items():
        scaled = {name: [1.01 * value for value in values]}
        assert towers_outputs.differing(outputs, outputs | scaled) == [name]
