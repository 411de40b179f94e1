"""EfficientNet-Lite weights under the names of efficientnet_lite_pytorch, BatchNorm folded."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from imgtune_jax.interop import weight_map
from imgtune_jax.models.efficientnet import EfficientNetLite
from imgtune_jax.types import Params

EPSILON = 1e-3  # TensorFlow's, not torch's default
IGNORED = r".*\.num_batches_tracked"


def efficientnet_lite_rules(tower: EfficientNetLite) -> list[weight_map.Rule]:
    """The rules for the tower's blocks. Raises ValueError if its norms are not folded."""
    if tower.norm != "folded":
        raise ValueError("pretrained EfficientNet-Lite weights need norm='folded'")

    def folded(theirs: str, batch_norm: str, ours: str) -> weight_map.Rule:
        return weight_map.folded_conv(theirs, batch_norm, ours, epsilon=EPSILON)

    found = [folded("_conv_stem", "_bn0", "stem"), folded("_conv_head", "_bn1", "head")]
    for i, fields in enumerate(tower.block_fields()):
        theirs, ours = f"_blocks.{i}", f"blocks_{i}"
        if fields["expand"] != 1:
            found.append(folded(f"{theirs}._expand_conv", f"{theirs}._bn0", f"{ours}/expand"))
        found += [
            folded(f"{theirs}._depthwise_conv", f"{theirs}._bn1", f"{ours}/depthwise"),
            folded(f"{theirs}._project_conv", f"{theirs}._bn2", f"{ours}/project"),
        ]
    return [*found, *weight_map.linear_rules("_fc", "classifier")] if tower.num_classes else found


def load_efficientnet_lite(
    state: Mapping[str, np.ndarray], tower: EfficientNetLite, expected: Params
) -> Params:
    """The tower's parameters. The classifier is dropped unless `num_classes` asks for it."""
    ignore = IGNORED if tower.num_classes else rf"{IGNORED}|_fc\..*"
    found = efficientnet_lite_rules(tower)
    return weight_map.to_params(state, found, expected, what="efficientnet_lite", ignore=ignore)
