"""ResNet weights under torchvision's names, BatchNorm folded."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from imgtune_jax.interop import weight_map
from imgtune_jax.models.resnet import ResNet
from imgtune_jax.types import Params

EPSILON = 1e-5
IGNORED = r".*\.num_batches_tracked"


def resnet_rules(tower: ResNet) -> list[weight_map.Rule]:
    """The rules for the tower's stages. Raises ValueError if its norms are not folded."""
    if tower.norm != "folded":
        raise ValueError("pretrained ResNet weights need norm='folded'")

    def folded(theirs: str, batch_norm: str, ours: str) -> weight_map.Rule:
        return weight_map.folded_conv(theirs, batch_norm, ours, epsilon=EPSILON)

    found = [folded("conv1", "bn1", "stem")]
    for stage, size in enumerate(tower.stage_sizes, start=1):
        for i in range(size):
            theirs, ours = f"layer{stage}.{i}", f"stage{stage}_{i}"
            found += [
                folded(f"{theirs}.conv{n}", f"{theirs}.bn{n}", f"{ours}/conv{n}") for n in (1, 2, 3)
            ]
            if i == 0:
                projection = f"{theirs}.downsample"
                found.append(folded(f"{projection}.0", f"{projection}.1", f"{ours}/project"))
    return [*found, *weight_map.linear_rules("fc", "classifier")] if tower.num_classes else found


def load_resnet(state: Mapping[str, np.ndarray], tower: ResNet, expected: Params) -> Params:
    """The tower's parameters. The classifier is dropped unless `num_classes` asks for it."""
    ignore = IGNORED if tower.num_classes else rf"{IGNORED}|fc\..*"
    return weight_map.to_params(state, resnet_rules(tower), expected, what="resnet", ignore=ignore)
