"""Conversion of ResNet weights from torchvision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from imgtune_jax.interop import folded_cnn, weight_map
from imgtune_jax.models.resnet import ResNet
from imgtune_jax.types import Params

CLASSIFIER = "fc"


def resnet_rules(tower: ResNet) -> list[weight_map.Rule]:
    """Return the conversion rules of the tower. Raises UserError if its norms are not folded."""
    return folded_cnn.folded_cnn_rules(tower, _convolutions(tower), classifier=CLASSIFIER)


def load_resnet(state: Mapping[str, np.ndarray], tower: ResNet, expected: Params) -> Params:
    """Convert a state dict. Without `num_classes`, the classifier's weights are dropped.

    `expected` has the paths and shapes of the result. Raises UserError listing every missing,
    unexpected and misshaped key.
    """
    rules = resnet_rules(tower)
    return folded_cnn.load_folded_cnn(
        state, tower, expected, rules, classifier=CLASSIFIER, model_name="resnet"
    )


def _convolutions(tower: ResNet) -> Iterator[folded_cnn.ConvNames]:
    """Yield (their convolution, their BatchNorm, our path) of every convolution."""
    yield "conv1", "bn1", "stem"
    for stage, num_blocks in enumerate(tower.stage_sizes, start=1):
        for i in range(num_blocks):
            theirs, ours = f"layer{stage}.{i}", f"stage{stage}_{i}"
            for n in (1, 2, 3):
                yield f"{theirs}.conv{n}", f"{theirs}.bn{n}", f"{ours}/conv{n}"
            if i == 0:
                yield f"{theirs}.downsample.0", f"{theirs}.downsample.1", f"{ours}/project"
