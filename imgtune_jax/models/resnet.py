"""ResNet v1.5 (1512.03385; the stride is in the 3×3 convolution, as in torchvision).

Axis letters: oh × ow output size, i input and o output channels.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from imgtune_jax.models import conv, layers

GROUP_SIZE = 16  # channels; the stem's 64 channels are four groups


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow c"]:
    """Return the 3×3 maximum at stride 2 with PyTorch's symmetric padding."""
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


class Bottleneck(nn.Module):
    """Convolutions 1×1, 3×3 (with the stride) and 1×1 (to 4·features channels), with a residual.

    If `project`, the residual is a 1×1 convolution of the input.
    """

    features: int
    stride: int
    project: bool
    norm: conv.Norm
    dtype: layers.Dtype = jnp.float32
    hand_written_gradients: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b oh ow o"]:
        layer = functools.partial(
            conv.ConvNorm,
            norm=self.norm,
            group_size=GROUP_SIZE,
            dtype=self.dtype,
            hand_written_gradients=self.hand_written_gradients,
        )
        out, pad = 4 * self.features, ((1, 1), (1, 1))
        y = layer(self.features, act="relu", name="conv1")(x)
        y = layer(self.features, 3, self.stride, act="relu", padding=pad, name="conv2")(y)
        y = layer(out, name="conv3")(y)
        if self.project:
            x = layer(out, stride=self.stride, name="project")(x)
        return jax.nn.relu(x + y)


class ResNet(conv.ConvTower):
    """CNN tower: the mean of the last feature map (2048 channels), and the map as tokens.

    Blocks are named `stage1_0`, `stage1_1`, … Padding is symmetric, as in PyTorch; at stride 2 it
    differs from SAME. Other fields are as in ConvTower.
    """

    CONFIG_NAME: ClassVar[str] = "resnet"
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "50": dict(stage_sizes=(3, 4, 6, 3)),
        "101": dict(stage_sizes=(3, 4, 23, 3)),
        "152": dict(stage_sizes=(3, 8, 36, 3)),
    }

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64

    def setup(self):
        common: dict[str, Any] = dict(
            norm=self.norm,
            dtype=self.dtype,
            hand_written_gradients=self.hand_written_gradients,
        )
        pad = ((3, 3), (3, 3))
        self.stem = conv.ConvNorm(
            self.width, 7, 2, act="relu", group_size=GROUP_SIZE, padding=pad, **common
        )
        block = nn.remat(Bottleneck) if self.remat else Bottleneck
        for stage, size in enumerate(self.stage_sizes):
            blocks = [
                block(
                    features=self.width * 2**stage,
                    stride=2 if stage > 0 and i == 0 else 1,
                    project=i == 0,
                    **common,
                )
                for i in range(size)
            ]
            setattr(self, f"stage{stage + 1}", blocks)
        if self.num_classes:
            self.classifier = self._make_classifier()

    def _feature_map(self, image: Array) -> tuple[Array, list[Array]]:
        x = max_pool(self.stem(image))
        for stage in range(len(self.stage_sizes)):
            for block in getattr(self, f"stage{stage + 1}"):
                x = self.constrain(block(x), ("batch", None, None, "embed"))
        return x, []
