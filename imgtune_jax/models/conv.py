"""Convolutions with their norms, and the base class of the CNN towers.

Feature maps are NHWC, kernels HWIO. Axis letters: kh × kw kernel size, oh × ow output size, i input
and o output channels, m = h·w tokens of e channels, n classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from imgtune_jax import xla_cpu
from imgtune_jax.errors import UserError
from imgtune_jax.models import initializers, layers, sizes
from imgtune_jax.models.pooling import TowerOutput
from imgtune_jax.types import Constrain, no_constraint

Padding = Literal["SAME"] | tuple[tuple[int, int], tuple[int, int]]
Norm = Literal["folded", "group"]

DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")
KERNEL_INIT = initializers.HE_NORMAL


def depthwise_conv(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw 1 c"], stride: int
) -> Float[Array, "b oh ow c"]:
    """Compute a depthwise convolution with SAME padding, as one grouped convolution."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=DIMENSION_NUMBERS,
        feature_group_count=x.shape[-1],
    )


class GroupNorm(nn.Module):
    """Group normalization (1803.08494) of NHWC maps in float32, without running statistics.

    Raises UserError if the number of channels is not divisible by `group_size`.
    """

    group_size: int
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        if c % self.group_size:
            raise UserError(
                f"{c} channels are not divisible by group_size={self.group_size}; set a divisor"
            )
        scale = initializers.param(self, "scale", initializers.ONES, (c,))
        bias = initializers.param(self, "bias", initializers.ZEROS, (c,))
        y = x.reshape(b, h, w, c // self.group_size, self.group_size)
        y = y - y.mean((1, 2, 4), keepdims=True)
        y = y * lax.rsqrt(jnp.square(y).mean((1, 2, 4), keepdims=True) + self.epsilon)
        y = y.reshape(x.shape)
        return y * layers.expand_like(scale, y) + layers.expand_like(bias, y)


class ConvNorm(nn.Module):
    """Convolution, norm, activation.

    `norm="folded"` is a convolution with a bias, for imported weights: their BatchNorm is folded
    into kernel and bias, so there is no norm to train. `norm="group"` is a bias-free convolution
    and a GroupNorm, for a CNN trained from scratch. Kernels are initialized He normal. A depthwise
    convolution has SAME padding. `hand_written_gradients` is as in `layers`.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    act: str | None = None
    norm: Norm = "folded"
    group_size: int = 8
    padding: Padding = "SAME"
    depthwise: bool = False
    dtype: layers.Dtype = jnp.float32
    hand_written_gradients: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b oh ow o"]:
        if self.norm not in ("folded", "group"):
            raise UserError(f"norm = {self.norm!r}; expected 'folded' or 'group'")
        inputs = 1 if self.depthwise else x.shape[-1]
        shape = (self.kernel_size, self.kernel_size, inputs, self.features)
        y = self._convolve(x, initializers.param(self, "kernel", KERNEL_INIT, shape))
        if self.norm == "folded":
            bias = initializers.param(self, "bias", initializers.ZEROS, (self.features,))
            y = y + layers.expand_like(bias, y)
        else:
            y = GroupNorm(self.group_size, name="norm")(y)
        return y if self.act is None else layers.activation(self.act)(y)

    def _convolve(self, x: Array, kernel: Array) -> Array:
        manual = self.hand_written_gradients
        if self.depthwise and xla_cpu.is_backend():
            return xla_cpu.shifted_depthwise_conv(
                x, kernel, self.stride, hand_written_gradients=manual
            )
        if self.depthwise:
            return depthwise_conv(x, kernel, self.stride)
        if self.kernel_size == 1:  # a matrix product over channels
            x = x[:, :: self.stride, :: self.stride]
            return layers.dense(x, kernel[0, 0], dtype=self.dtype, hand_written_gradients=manual)
        y = lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=DIMENSION_NUMBERS,
        )
        return y.astype(jnp.float32)


class ConvTower(nn.Module):
    """Base of the CNN towers: the mean of the last feature map, and the map as tokens.

    Images are normalized NHWC. `norm` is as in ConvNorm. `num_classes` adds the `classifier` that
    `classify` needs. `remat` recomputes blocks in the backward pass, except on a CPU, where XLA
    merges the recomputation with the forward pass. `hand_written_gradients=True` is faster, and
    supports reverse mode only; with False, `jax.jvp` works too.
    """

    CONFIG_NAME: ClassVar[str]
    VARIANTS: ClassVar[Mapping[str, Mapping[str, Any]]]

    norm: Norm = "folded"
    num_classes: int = 0
    dtype: layers.Dtype = jnp.float32
    remat: bool = False
    hand_written_gradients: bool = True
    constrain: Constrain = no_constraint

    @classmethod
    def variant_fields(cls, variant: str) -> dict[str, Any]:
        """Return the fields of a variant, a key of VARIANTS."""
        return sizes.get_variant(cls.VARIANTS, variant, cls.CONFIG_NAME)

    def __call__(self, image: Float[Array, "b h w c"], *, train: bool = False) -> TowerOutput:
        del train  # no dropout, no norm statistics
        x, extra_means = self._feature_map(image.astype(jnp.float32))
        mean = x.mean((1, 2))
        if self.num_classes and self.is_initializing():
            self.classifier(mean)  # so that `init` creates its parameters
        return TowerOutput(jnp.concatenate([mean, *extra_means], axis=-1), _flatten_map(x))

    def run_prefix(self, image: Float[Array, "b h w c"]) -> Float[Array, "b m e"]:
        """Return the tokens, whose mean is the pooled vector."""
        return _flatten_map(self._feature_map(image.astype(jnp.float32))[0])

    def run_suffix(self, tokens: Float[Array, "b m e"], *, train: bool = False) -> TowerOutput:
        """Return the tower's output, given the output of `run_prefix`."""
        del train
        return TowerOutput(tokens.mean(1), tokens)

    def classify(self, image: Float[Array, "b h w c"]) -> Float[Array, "b n"]:
        """Return the logits of the `num_classes` classes that the weights were trained on."""
        if not self.num_classes:
            raise UserError("classify needs num_classes; these weights have no classifier")
        x, _ = self._feature_map(image.astype(jnp.float32))
        return self.classifier(x.mean((1, 2)))

    def _feature_map(self, image: Array) -> tuple[Array, list[Array]]:
        """Return the last map [b h w e], and vectors per image to append to its mean."""
        raise NotImplementedError

    def _make_classifier(self) -> layers.Dense:
        manual = self.hand_written_gradients
        return layers.Dense(self.num_classes, dtype=self.dtype, hand_written_gradients=manual)


def _flatten_map(x: Float[Array, "b h w e"]) -> Float[Array, "b m e"]:
    return x.reshape(x.shape[0], -1, x.shape[-1])
