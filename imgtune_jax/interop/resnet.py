"""ResNet weights under torchvision's names, BatchNorm folded."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from imgtune_jax.interop import rules
from imgtune_jax.models.resnet import ResNet
from imgtune_jax.types import Params

EPSILON = 1e-5
NOT_WEIGHTS = r".*\.num_batches_tracked"


def weight_map(tower: ResNet) -> list[rules.Rule]:
    """The rules for the tower's stages. Raises ValueError if its norms are not folded."""
    if tower.norm != "folded":
        raise ValueError("pretrained ResNet weights need norm='folded'")

    def folded(theirs: str, batch_norm: str, ours: str) -> rules.Rule:
        return rules.folded_conv(theirs, batch_norm, ours, epsilon=EPSILON)

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
    return [*found, *rules.linear("fc", "classifier")] if tower.num_classes else found


def load(state: Mapping[str, np.ndarray], tower: ResNet, expected: Params) -> Params:
    """The tower's parameters. The classifier is dropped unless `num_classes` asks for it."""
    ignore = NOT_WEIGHTS if tower.num_classes else rf"{NOT_WEIGHTS}|fc\..*"
    return rules.convert(state, weight_map(tower), expected, what="resnet", ignore=ignore)
