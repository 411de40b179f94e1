"""EfficientNet-Lite (1905.11946; the Lite variants drop squeeze-excite and swish for ReLU6)."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, ClassVar, NamedTuple, cast

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from imgtune_jax.models import conv, layers, sizes
from imgtune_jax.models.layer_stack import Part
from imgtune_jax.models.pooling import TowerOutput


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
    """expand 1×1 → depthwise → project 1×1, with a residual where shapes allow one.

    Gives the map, and the spatial mean of the expanded one (of the input, where nothing expands).
    """

    features: int
    kernel_size: int
    stride: int
    expand: int
    norm: conv.Norm
    depthwise: conv.DepthwiseMode
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w i"]
    ) -> tuple[Float[Array, "b oh ow o"], Float[Array, "b e"]]:
        inner = x.shape[-1] * self.expand
        layer = functools.partial(conv.ConvNorm, norm=self.norm, dtype=self.dtype)
        y = x
        if self.expand != 1:
            y = layer(inner, act="relu6", name="expand")(y)
        expanded = y.mean((1, 2))
        y = layer(
            inner,
            self.kernel_size,
            self.stride,
            act="relu6",
            depthwise=self.depthwise,
            name="depthwise",
        )(y)
        y = layer(self.features, name="project")(y)
        return (x + y if self.stride == 1 and x.shape == y.shape else y), expanded


class EfficientNetLite(nn.Module):
    """Normalised NHWC images to a 1280-d mean-pooled vector; tokens are the last map.

    `pool_stages` appends to the vector, for each of those stages (0 to 6), the mean of the expanded
    (6× wide) map of its first block: coarse classes live at the end of the network, textures and
    shapes before it. These means are no function of the tokens, so with them `part` is refused.
    `num_classes` adds the `classifier` that `classify` needs. Padding is
    TensorFlow's SAME. `remat` recomputes blocks in the backward pass; on a CPU, XLA merges
    the recomputation away.
    """

    VARIANTS: ClassVar[dict[str, dict[str, float]]] = {
        "lite0": dict(width_factor=1.0, depth_factor=1.0),
        "lite1": dict(width_factor=1.0, depth_factor=1.1),
        "lite2": dict(width_factor=1.1, depth_factor=1.2),
        "lite3": dict(width_factor=1.2, depth_factor=1.4),
        "lite4": dict(width_factor=1.4, depth_factor=1.8),
    }

    CPU_BATCH: ClassVar[int] = 16  # see ImageText; 1.35 times the images a second of 512 at once

    width_factor: float = 1.0
    depth_factor: float = 1.0
    norm: conv.Norm = "folded"
    depthwise: conv.DepthwiseMode = "auto"
    pool_stages: tuple[int, ...] = ()
    num_classes: int = 0
    dtype: layers.Dtype = jnp.float32
    remat: bool = False
    constrain: layers.Constrain = layers.no_constraint

    @classmethod
    def variant_fields(cls, variant: str) -> dict[str, Any]:
        """The scaling factors behind a name of VARIANTS."""
        return sizes.get_variant(cls.VARIANTS, variant, "efficientnet_lite")

    def setup(self):
        if any(stage not in range(len(STAGES)) for stage in self.pool_stages):
            raise ValueError(f"pool_stages={self.pool_stages}; want stages 0 to {len(STAGES) - 1}")
        layer: Any = functools.partial(conv.ConvNorm, norm=self.norm, dtype=self.dtype)
        self.stem = layer(32, 3, 2, act="relu6")
        block = nn.remat(InvertedResidual) if self.remat else InvertedResidual
        common: dict[str, Any] = dict(norm=self.norm, depthwise=self.depthwise, dtype=self.dtype)
        self.blocks = [block(**common, **fields) for fields in self.block_fields()]
        self.head = layer(1280, act="relu6")
        if self.num_classes:
            self.classifier = layers.Dense(self.num_classes, dtype=self.dtype)

    def stage_repeats(self) -> list[int]:
        """Blocks in each stage. Lite does not deepen the first and the last."""
        inner = [math.ceil(s.repeats * self.depth_factor) for s in STAGES[1:-1]]
        return [STAGES[0].repeats, *inner, STAGES[-1].repeats]

    def block_fields(self) -> list[dict[str, Any]]:
        """The fields of each block in turn. Lite does not widen the stem and the head."""
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

    def __call__(
        self,
        image: Float[Array, "b h w c"] | Float[Array, "b m e"],
        *,
        train: bool,
        part: Part = "whole",
    ) -> TowerOutput | Array:
        """`part`: "front" gives the tokens, "rest" takes them for the image."""
        del train  # no dropout, no norm statistics
        if part != "whole" and self.pool_stages:
            raise ValueError(
                f"efficientnet_lite pools stages {self.pool_stages} too, which its tokens do not "
                "hold; to cache tokens for a decoder or a pooler, set pool_stages=()"
            )
        if part == "rest":
            return TowerOutput(image.mean(1), image)
        x = self.stem(image.astype(jnp.float32))
        blocks, means = iter(self.blocks), []
        for repeats in self.stage_repeats():
            for i, block in enumerate(itertools.islice(blocks, repeats)):
                x, expanded = block(x)
                x = self.constrain(x, ("batch", None, None, "embed"))
                if i == 0:
                    means.append(expanded)
        x = self.head(x)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        if part == "front":
            return tokens
        pooled = jnp.concatenate([x.mean((1, 2)), *(means[s] for s in self.pool_stages)], axis=-1)
        if self.num_classes and self.is_initializing():
            self.classifier(x.mean((1, 2)))  # so that init draws its parameters
        return TowerOutput(pooled, tokens)

    def classify(self, image: Float[Array, "b h w c"]) -> Float[Array, "b n"]:
        """Logits of the `num_classes` that the weights were trained on."""
        if not self.num_classes:
            raise ValueError("classify needs num_classes; these weights carry no classifier")
        pooled = cast(TowerOutput, self(image, train=False)).pooled
        return self.classifier(pooled[:, : self.head.features])


def round_filters(features: int, factor: float) -> int:
    """Scaled width, a multiple of 8 that is at least 90 % of the exact one (the authors' rule)."""
    scaled = features * factor
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded
