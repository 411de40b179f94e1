"""ResNet v1.5 (1512.03385; the stride stands in the 3×3 convolution, as in torchvision)."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from imgtune_jax.models import conv, layers, sizes
from imgtune_jax.models.layer_stack import Part
from imgtune_jax.models.pooling import TowerOutput

GROUP_SIZE = 16  # the stem's 64 channels in four groups


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow c"]:
    """3×3 maximum at stride 2 with torch's symmetric padding."""
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


class Bottleneck(nn.Module):
    """1×1 → 3×3 (stride) → 1×1 to 4·features, added to the input or to its projection."""

    features: int
    stride: int
    project: bool
    norm: conv.Norm
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b oh ow o"]:
        layer = functools.partial(
            conv.ConvNorm, norm=self.norm, group_size=GROUP_SIZE, dtype=self.dtype
        )
        out, pad = 4 * self.features, ((1, 1), (1, 1))
        y = layer(self.features, act="relu", name="conv1")(x)
        y = layer(self.features, 3, self.stride, act="relu", padding=pad, name="conv2")(y)
        y = layer(out, name="conv3")(y)
        if self.project:
            x = layer(out, stride=self.stride, name="project")(x)
        return jax.nn.relu(x + y)


class ResNet(nn.Module):
    """Normalised NHWC images to a 2048-d mean-pooled vector; tokens are the last map.

    `norm`, `num_classes` and `remat` as in EfficientNetLite. Blocks are `stage1_0`, `stage1_1`, …
    Padding is torch's (symmetric), which differs from SAME at stride 2.
    """

    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "50": dict(stage_sizes=(3, 4, 6, 3)),
        "101": dict(stage_sizes=(3, 4, 23, 3)),
        "152": dict(stage_sizes=(3, 8, 36, 3)),
    }

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    norm: conv.Norm = "folded"
    num_classes: int = 0
    dtype: layers.Dtype = jnp.float32
    remat: bool = False
    constrain: layers.Constrain = layers.no_constraint

    @classmethod
    def variant_fields(cls, variant: str) -> dict[str, Any]:
        """The depths behind a name of VARIANTS."""
        return sizes.get_variant(cls.VARIANTS, variant, "resnet")

    def setup(self):
        """Declares the stem, four stages of blocks and, where asked for, the classifier."""
        self.stem = conv.ConvNorm(
            self.width,
            7,
            2,
            act="relu",
            norm=self.norm,
            group_size=GROUP_SIZE,
            padding=((3, 3), (3, 3)),
            dtype=self.dtype,
        )
        block = nn.remat(Bottleneck) if self.remat else Bottleneck
        for stage, size in enumerate(self.stage_sizes):
            blocks = [
                block(
                    features=self.width * 2**stage,
                    stride=2 if stage > 0 and i == 0 else 1,
                    project=i == 0,
                    norm=self.norm,
                    dtype=self.dtype,
                )
                for i in range(size)
            ]
            setattr(self, f"stage{stage + 1}", blocks)
        if self.num_classes:
            self.classifier = layers.Dense(self.num_classes, dtype=self.dtype)

    def __call__(
        self,
        image: Float[Array, "b h w c"] | Float[Array, "b m e"],
        *,
        train: bool,
        part: Part = "whole",
    ) -> TowerOutput | Array:
        """`part`: "front" gives the tokens, "rest" takes them for the image."""
        del train  # no dropout, no norm statistics
        if part == "rest":
            return TowerOutput(image.mean(1), image)
        x = self.stem(image.astype(jnp.float32))
        x = max_pool(x)
        for stage in range(len(self.stage_sizes)):
            for block in getattr(self, f"stage{stage + 1}"):
                x = self.constrain(block(x), ("batch", None, None, "embed"))
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        if part == "front":
            return tokens
        pooled = x.mean((1, 2))
        if self.num_classes and self.is_initializing():
            self.classifier(pooled)  # so that init draws its parameters
        return TowerOutput(pooled, tokens)

    def classify(self, image: Float[Array, "b h w c"]) -> Float[Array, "b n"]:
        """Logits of the `num_classes` that the weights were trained on."""
        if not self.num_classes:
            raise ValueError("classify needs num_classes; these weights carry no classifier")
        return self.classifier(cast(TowerOutput, self(image, train=False)).pooled)
