"""Conversion of pretrained CNNs. Each BatchNorm is folded into the convolution before it.

The names of the layers are in `torchvision.py` and `efficientnet_lite.py`. "Their" names are those
of the other codebase, "our" paths those of this package.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from imgtune_jax.errors import UserError
from imgtune_jax.interop import weight_map
from imgtune_jax.models.efficientnet import EfficientNetLite
from imgtune_jax.models.resnet import ResNet
from imgtune_jax.types import Params

FoldedCNN = ResNet | EfficientNetLite
ConvNames = tuple[str, str, str]  # (their convolution, their BatchNorm, our path)

BATCH_NORM_EPSILON = 1e-5  # PyTorch's default
BATCH_COUNTS = r".*\.num_batches_tracked"  # counters of BatchNorm that inference ignores


def folded_cnn_rules(
    tower: FoldedCNN,
    convolutions: Iterable[ConvNames],
    *,
    classifier: str,
    epsilon: float = BATCH_NORM_EPSILON,
) -> list[weight_map.Rule]:
    """Return the rules of the convolutions and, if the tower has `num_classes`, of the classifier.

    `classifier` is the other codebase's name of the last linear layer. Raises UserError
    if the tower's norms are not folded.
    """
    if tower.norm != "folded":
        raise UserError(
            f"norm = {tower.norm!r} in a {type(tower).__name__} with pretrained weights; expected "
            "'folded': set norm='folded'"
        )
    rules = [weight_map.folded_conv_rule(*names, epsilon=epsilon) for names in convolutions]
    return rules + weight_map.linear_rules(classifier, "classifier") if tower.num_classes else rules


def load_folded_cnn(
    state: Mapping[str, np.ndarray],
    tower: FoldedCNN,
    expected: Params,
    rules: Sequence[weight_map.Rule],
    *,
    classifier: str,
    model_name: str,
) -> Params:
    """Convert a state dict by `rules`. Without `num_classes`, the classifier's weights are dropped.

    `expected` has the paths and shapes of the result. Raises UserError listing every missing,
    unexpected and misshaped key.
    """
    ignore = BATCH_COUNTS if tower.num_classes else rf"{BATCH_COUNTS}|{classifier}\..*"
    return weight_map.to_params(state, rules, expected, what=model_name, ignore=ignore)
