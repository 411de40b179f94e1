"""EfficientNet-Lite (1905.11946). It has no squeeze-and-excitation, and ReLU6 instead of swish.

Axis letters: oh × ow output size, i input and o output channels, m tokens. e is the number of
channels of the expanded map in a block, and of the tokens.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from imgtune_jax.errors import UserError
from imgtune_jax.models import conv, layers


class Stage(NamedTuple):
    """A row of the paper's table 1: `repeats` blocks, the first of which has the stride."""

    repeats: int
    kernel_size: int
    stride: int
    expand: int
    features: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise convolution and 1×1 projection.

    There is a residual if the stride is 1 and input and output have one shape. Returns the output
    map, and the spatial mean of the expanded map (of the input if `expand` is 1).
    """

    features: int
    kernel_size: int
    stride: int
    expand: int
    norm: conv.Norm
    dtype: layers.Dtype = jnp.float32
    hand_written_gradients: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w i"]
    ) -> tuple[Float[Array, "b oh ow o"], Float[Array, "b e"]]:
        width = x.shape[-1] * self.expand
        layer = functools.partial(
            conv.ConvNorm,
            norm=self.norm,
            dtype=self.dtype,
            hand_written_gradients=self.hand_written_gradients,
        )
        y = x
        if self.expand != 1:
            y = layer(width, act="relu6", name="expand")(y)
        expanded = y.mean((1, 2))
        size = (self.kernel_size, self.stride)
        y = layer(width, *size, act="relu6", depthwise=True, name="depthwise")(y)
        y = layer(self.features, name="project")(y)
        return (x + y if self.stride == 1 and x.shape == y.shape else y), expanded


class EfficientNetLite(conv.ConvTower):
    """CNN tower: the mean of the last feature map (1280 channels), and the map as tokens.

    `pool_stages` appends further means to the vector, one per listed stage (0 to 6). Each is the
    mean of the expanded map of the stage's first block, which is 6 times as wide as the block's
    input (equal to it in stage 0). The last map represents coarse classes; earlier maps represent
    textures and shapes. The further means cannot be computed from the tokens, so `run_prefix` and
    `run_suffix` raise UserError unless `pool_stages` is empty.

    Padding is TensorFlow's SAME. Other fields are as in ConvTower.
    """

    CONFIG_NAME: ClassVar[str] = "efficientnet_lite"
    VARIANTS: ClassVar[dict[str, dict[str, float]]] = {
        "lite0": dict(width_factor=1.0, depth_factor=1.0),
        "lite1": dict(width_factor=1.0, depth_factor=1.1),
        "lite2": dict(width_factor=1.1, depth_factor=1.2),
        "lite3": dict(width_factor=1.2, depth_factor=1.4),
        "lite4": dict(width_factor=1.4, depth_factor=1.8),
    }
    # The maps of a full batch exceed a CPU's cache; see `xla_cpu.map_chunks`.
    MAP_CHUNKS: ClassVar[bool] = True

    width_factor: float = 1.0
    depth_factor: float = 1.0
    pool_stages: tuple[int, ...] = ()

    def setup(self):
        if any(stage not in range(len(STAGES)) for stage in self.pool_stages):
            raise UserError(
                f"pool_stages = {self.pool_stages}; expected stages 0 to {len(STAGES) - 1}"
            )
        common: dict[str, Any] = dict(
            norm=self.norm,
            dtype=self.dtype,
            hand_written_gradients=self.hand_written_gradients,
        )
        self.stem = conv.ConvNorm(32, 3, 2, act="relu6", **common)
        block = nn.remat(InvertedResidual) if self.remat else InvertedResidual
        self.blocks = [block(**common, **fields) for fields in self.block_fields()]
        self.head = conv.ConvNorm(1280, act="relu6", **common)
        if self.num_classes:
            self.classifier = self._make_classifier()

    def stage_repeats(self) -> list[int]:
        """Return the number of blocks of each stage; in the first and last it is not scaled."""
        middle = [math.ceil(s.repeats * self.depth_factor) for s in STAGES[1:-1]]
        return [STAGES[0].repeats, *middle, STAGES[-1].repeats]

    def block_fields(self) -> list[dict[str, Any]]:
        """Return the fields of each block in order. Only blocks are widened, not stem and head."""
        return [
            dict(
                features=round_filters(stage.features, self.width_factor),
                kernel_size=stage.kernel_size,
                stride=stage.stride if i == 0 else 1,
                expand=stage.expand,
            )
            for stage, repeats in zip(STAGES, self.stage_repeats(), strict=True)
            for i in range(repeats)
        ]

    def run_prefix(self, image: Float[Array, "b h w c"]) -> Float[Array, "b m e"]:
        """Return the tokens, whose mean is the pooled vector."""
        self._check_no_pool_stages()
        return super().run_prefix(image)

    def run_suffix(self, tokens: Float[Array, "b m e"], *, train: bool = False) -> conv.TowerOutput:
        """Return the tower's output, given the output of `run_prefix`."""
        self._check_no_pool_stages()
        return super().run_suffix(tokens, train=train)

    def _check_no_pool_stages(self) -> None:
        if self.pool_stages:
            raise UserError(
                f"efficientnet_lite has pool_stages={self.pool_stages}, whose means cannot be "
                "computed from cached tokens; set pool_stages=() to cache tokens"
            )

    def _feature_map(self, image: Array) -> tuple[Array, list[Array]]:
        x = self.stem(image)
        blocks, means = iter(self.blocks), []
        for repeats in self.stage_repeats():
            for i, block in enumerate(itertools.islice(blocks, repeats)):
                x, expanded = block(x)
                x = self.constrain(x, ("batch", None, None, "embed"))
                if i == 0:
                    means.append(expanded)
        return self.head(x), [means[stage] for stage in self.pool_stages]


def round_filters(features: int, factor: float) -> int:
    """Return features * factor, rounded to a multiple of 8 that is at least 90% of the product."""
    scaled = features * factor
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded
