"""Convolutions of the CNN towers: NHWC, kernels HWIO, each followed by a norm or by its remains."""

from __future__ import annotations

import functools
import operator
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from imgtune_jax.models import init, layers

Padding = Literal["SAME"] | tuple[tuple[int, int], tuple[int, int]]
Norm = Literal["folded", "group"]
DepthwiseMode = Literal["auto", "shifted", "grouped"]

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
KERNEL_INIT = init.HE


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME: the odd pixel goes to the end. With stride 2 torch's k//2 differs."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def depthwise_shifted(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw 1 c"], *, stride: int
) -> Float[Array, "b oh ow c"]:
    """Depthwise convolution with SAME padding as kh·kw shifted multiply-adds.

    XLA:CPU runs this about five times faster than a grouped convolution.
    """
    k = kernel.shape[0]
    h, w = x.shape[1:3]
    oh, ow = -(-h // stride), -(-w // stride)
    x = jnp.pad(x, ((0, 0), same_padding(h, k, stride), same_padding(w, k, stride), (0, 0)))
    rows = [slice(i, i + (oh - 1) * stride + 1, stride) for i in range(k)]
    columns = [slice(j, j + (ow - 1) * stride + 1, stride) for j in range(k)]
    terms = (
        x[:, rows[i], columns[j]] * kernel[i : i + 1, j : j + 1].reshape(1, 1, 1, -1)
        for i in range(k)
        for j in range(k)
    )
    return functools.reduce(operator.add, terms)


def depthwise_grouped(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw 1 c"], *, stride: int
) -> Float[Array, "b oh ow c"]:
    """The same as one grouped convolution, which GPU and TPU prefer."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=DIMENSIONS,
        feature_group_count=x.shape[-1],
    )


def depthwise(x: Array, kernel: Array, *, stride: int, mode: DepthwiseMode) -> Array:
    """One of the two forms above; "auto" takes the faster for the default backend."""
    if mode == "auto":
        mode = "shifted" if jax.default_backend() == "cpu" else "grouped"
    if mode not in ("shifted", "grouped"):
        raise ValueError(f"depthwise={mode!r}; want 'auto', 'shifted' or 'grouped'")
    run = depthwise_shifted if mode == "shifted" else depthwise_grouped
    return run(x, kernel, stride=stride)


class GroupNorm(nn.Module):
    """Group normalisation (1803.08494) of NHWC maps in float32. No statistics to carry.

    Raises ValueError if the channels do not divide into groups of `group_size`.
    """

    group_size: int
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        if c % self.group_size:
            raise ValueError(f"{c} channels do not divide into groups of {self.group_size}")
        scale = self.param("scale", init.ONES, (c,), jnp.float32)
        bias = self.param("bias", init.ZEROS, (c,), jnp.float32)
        y = x.reshape(b, h, w, c // self.group_size, self.group_size)
        y = y - y.mean((1, 2, 4), keepdims=True)
        y = y * lax.rsqrt(jnp.square(y).mean((1, 2, 4), keepdims=True) + self.epsilon)
        y = y.reshape(x.shape)
        return y * layers.over_last(scale, y) + layers.over_last(bias, y)


class ConvNorm(nn.Module):
    """Convolution, norm, activation.

    `norm="folded"` is a convolution with a bias, into which an imported BatchNorm was folded; it
    is the form to load weights into, and has no norm to train with. `norm="group"` is a bias-free
    convolution and a GroupNorm, for a CNN trained from scratch (He normal).
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    act: str | None = None
    norm: Norm = "folded"
    group_size: int = 8
    padding: Padding = "SAME"
    depthwise: DepthwiseMode | None = None  # None: a full convolution
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b oh ow o"]:
        if self.norm not in ("folded", "group"):
            raise ValueError(f"norm={self.norm!r}; want 'folded' or 'group'")
        inputs = x.shape[-1] if self.depthwise is None else 1
        shape = (self.kernel_size, self.kernel_size, inputs, self.features)
        kernel = self.param("kernel", KERNEL_INIT, shape, jnp.float32)
        y = self._convolve(x, kernel)
        if self.norm == "folded":
            bias = self.param("bias", init.ZEROS, (self.features,), jnp.float32)
            y = y + layers.over_last(bias, y)
        else:
            y = GroupNorm(self.group_size, name="norm")(y)
        return y if self.act is None else layers.activation(self.act)(y)

    def _convolve(self, x: Array, kernel: Array) -> Array:
        if self.depthwise is not None:
            return depthwise(x, kernel, stride=self.stride, mode=self.depthwise)
        if self.kernel_size == 1:  # a product over channels: the fast and accurate path of `dense`
            x = x[:, :: self.stride, :: self.stride]
            return layers.dense(x, kernel[0, 0], dtype=self.dtype)
        y = lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=DIMENSIONS,
        )
        return y.astype(jnp.float32)
