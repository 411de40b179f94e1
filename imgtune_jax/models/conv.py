"""Convolutions of the CNN towers: NHWC, kernels HWIO, each followed by a norm or by its remains."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from imgtune_jax.models import initializers, layers

Padding = Literal["SAME"] | tuple[tuple[int, int], tuple[int, int]]
Norm = Literal["folded", "group"]
DepthwiseMode = Literal["auto", "shifted", "grouped"]

DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")
KERNEL_INIT = initializers.HE_NORMAL


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME: the odd pixel goes to the end. With stride 2 torch's k//2 differs."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_shifted(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw 1 c"], stride: int
) -> Float[Array, "b oh ow c"]:
    """Depthwise convolution with SAME padding as kh·kw shifted multiply-adds.

    XLA:CPU runs this ten times faster than a grouped convolution.
    """
    out = [-(-size // stride) for size in x.shape[1:3]]
    x = _pad_same(x, kernel.shape[0], stride)
    return _sum_windows(x, kernel, out, stride)


def _shifted_forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return depthwise_shifted(x, kernel, stride), (x, kernel)


def _shifted_backward(stride: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    """What autodiff gives, in the form that XLA:CPU runs fast and in little memory.

    Autodiff saves or adds up kh·kw maps of the input's size. Here the gradient of the input is the
    same sum of taps, with the kernel turned round and the strides filled with zeros; that of the
    kernel is summed image by image, so that an image's taps stay in the processor's cache.
    """
    x, kernel = saved
    k, (h, w), (oh, ow) = kernel.shape[0], x.shape[1:3], g.shape[1:3]

    def add_image(total: Array, image: tuple[Array, Array]) -> tuple[Array, None]:
        one, cotangent = image
        taps = [
            (one[i, j] * cotangent).sum((0, 1)) for i, j in _shifted_windows(k, (oh, ow), stride)
        ]
        return total + jnp.stack(taps), None

    zeros = jnp.zeros((k * k, kernel.shape[-1]), kernel.dtype)
    kernel_grad, _ = lax.scan(add_image, zeros, (_pad_same(x, k, stride), g))

    def spread(size: int, out: int) -> tuple[int, int, int]:
        low = k - 1 - same_padding(size, k, stride)[0]
        return low, size + k - 1 - low - ((out - 1) * stride + 1), stride - 1

    g = lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), spread(h, oh), spread(w, ow), (0, 0, 0)))
    return _sum_windows(g, kernel[::-1, ::-1], (h, w), 1), kernel_grad.reshape(kernel.shape)


depthwise_shifted.defvjp(_shifted_forward, _shifted_backward)


def _pad_same(x: Array, k: int, stride: int) -> Array:
    h, w = x.shape[1:3]
    return jnp.pad(x, ((0, 0), same_padding(h, k, stride), same_padding(w, k, stride), (0, 0)))


def _shifted_windows(k: int, out: Sequence[int], stride: int) -> list[tuple[slice, slice]]:
    """The rows and columns of a padded map that each of the k·k entries of a kernel meets."""
    rows, columns = (
        [slice(i, i + (size - 1) * stride + 1, stride) for i in range(k)] for size in out
    )
    return list(itertools.product(rows, columns))


def _sum_windows(x: Array, kernel: Array, out: Sequence[int], stride: int) -> Array:
    k, c = kernel.shape[0], kernel.shape[-1]
    taps = zip(_shifted_windows(k, out, stride), kernel.reshape(k * k, 1, 1, 1, c), strict=True)
    return functools.reduce(operator.add, (x[:, i, j] * weights for (i, j), weights in taps))


def depthwise_conv(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw 1 c"], stride: int
) -> Float[Array, "b oh ow c"]:
    """The same as one grouped convolution, which GPU and TPU prefer."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=DIMENSION_NUMBERS,
        feature_group_count=x.shape[-1],
    )


def depthwise(x: Array, kernel: Array, *, stride: int, mode: DepthwiseMode) -> Array:
    """One of the two forms above; "auto" takes the faster for the default backend."""
    if mode == "auto":
        mode = "shifted" if jax.default_backend() == "cpu" else "grouped"
    if mode not in ("shifted", "grouped"):
        raise ValueError(f"depthwise={mode!r}; want 'auto', 'shifted' or 'grouped'")
    run = depthwise_shifted if mode == "shifted" else depthwise_conv
    return run(x, kernel, stride)


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
        scale = self.param("scale", initializers.ONES, (c,), jnp.float32)
        bias = self.param("bias", initializers.ZEROS, (c,), jnp.float32)
        y = x.reshape(b, h, w, c // self.group_size, self.group_size)
        y = y - y.mean((1, 2, 4), keepdims=True)
        y = y * lax.rsqrt(jnp.square(y).mean((1, 2, 4), keepdims=True) + self.epsilon)
        y = y.reshape(x.shape)
        return y * layers.expand_like(scale, y) + layers.expand_like(bias, y)


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
            bias = self.param("bias", initializers.ZEROS, (self.features,), jnp.float32)
            y = y + layers.expand_like(bias, y)
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
            dimension_numbers=DIMENSION_NUMBERS,
        )
        return y.astype(jnp.float32)
