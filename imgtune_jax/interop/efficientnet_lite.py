"""Conversion of EfficientNet-Lite weights from the package efficientnet_lite_pytorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from imgtune_jax.interop import folded_cnn, weight_map
from imgtune_jax.models.efficientnet import EfficientNetLite
from imgtune_jax.types import Params

CLASSIFIER = "_fc"


def efficientnet_lite_rules(tower: EfficientNetLite) -> list[weight_map.Rule]:
    """Return the conversion rules of the tower. Raises UserError if its norms are not folded."""
    return folded_cnn.folded_cnn_rules(
        tower,
        _convolutions(tower),
        classifier=CLASSIFIER,
        epsilon=1e-3,  # TensorFlow's default; the weights were trained there
    )


def load_efficientnet_lite(
    state: Mapping[str, np.ndarray], tower: EfficientNetLite, expected: Params
) -> Params:
    """Convert a state dict. Without `num_classes`, the classifier's weights are dropped.

    `expected` has the paths and shapes of the result. Raises UserError listing every missing,
    unexpected and misshaped key.
    """
    rules = efficientnet_lite_rules(tower)
    return folded_cnn.load_folded_cnn(
        state, tower, expected, rules, classifier=CLASSIFIER, model_name="efficientnet_lite"
    )


def _convolutions(tower: EfficientNetLite) -> Iterator[folded_cnn.ConvNames]:
    """Yield (their convolution, their BatchNorm, our path) of every convolution."""
    yield "_conv_stem", "_bn0", "stem"
    yield "_conv_head", "_bn1", "head"
    for i, fields in enumerate(tower.block_fields()):
        theirs, ours = f"_blocks.{i}", f"blocks_{i}"
        if fields["expand"] != 1:
            yield f"{theirs}._expand_conv", f"{theirs}._bn0", f"{ours}/expand"
        yield f"{theirs}._depthwise_conv", f"{theirs}._bn1", f"{ours}/depthwise"
        yield f"{theirs}._project_conv", f"{theirs}._bn2", f"{ours}/project"
