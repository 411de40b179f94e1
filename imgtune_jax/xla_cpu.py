"""Forms of operations that only XLA:CPU needs, and the one place that chooses them.

Everything else in this package is written for accelerators. Each form here returns the same values
as the general one; a test compares them.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

CONV_BATCH = 16  # rows; 1.35 times the images per second of EfficientNet-Lite on 512 rows at once


def is_backend() -> bool:
    """Return whether programs run on XLA:CPU by default."""
    return jax.default_backend() == "cpu"


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, bool]:
    """Return the options to compile a training step with on a mesh, in addition to the defaults.

    On several CPU devices, XLA's concurrency-optimized scheduler lets each device choose among
    collectives that do not depend on each other. Two devices can then wait in different ones until
    the time-out aborts the process (4 of 6 runs of coca_emoji on data=4, tensor=2; without that
    scheduler 0 of 8).
    """
    several_cpus = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    return {"xla_cpu_enable_concurrency_optimized_scheduler": False} if several_cpus else {}


def remat_needs_scan() -> bool:
    """Return whether recomputed layers must run in a scan.

    XLA:CPU drops the barriers that separate a recomputation from the forward pass, and merges the
    two. It does not merge across the iterations of a scan.
    """
    return is_backend()


def map_chunks(f: Callable[..., Array], *inputs: Shaped[Array, "b ..."]) -> Shaped[Array, "b ..."]:
    """Return f(*inputs) for a function whose output rows depend only on the same input rows.

    On one CPU device, f runs on `CONV_BATCH` rows at a time, whose feature maps fit the
    processor's cache. A batch that `CONV_BATCH` does not divide runs at once.
    """
    b = len(inputs[0])
    splits = is_backend() and jax.device_count() == 1 and b > CONV_BATCH and b % CONV_BATCH == 0
    if not splits:
        return f(*inputs)
    chunks = [x.reshape(b // CONV_BATCH, CONV_BATCH, *x.shape[1:]) for x in inputs]
    out = lax.map(lambda chunk: f(*chunk), chunks)
    return out.reshape(b, *out.shape[2:])


def contract(
    a: Shaped[Array, "*n i j"], b: Shaped[Array, "*n k l"], *, axes: tuple[int, int]
) -> Float[Array, "*n r c"]:
    """Sum a product over one axis of each operand, -1 or -2, in float32. Leading axes are batched.

    Operands of lower precision take the form `dot` when the program is lowered for a CPU.
    """
    general = functools.partial(_dot_general, axes=axes)
    if a.dtype == jnp.float32:
        return general(a, b)
    return lax.platform_dependent(a, b, cpu=functools.partial(dot, axes=axes), default=general)


def _dot_general(a: Array, b: Array, *, axes: tuple[int, int]) -> Array:
    batch = tuple(range(a.ndim - 2))
    left, right = ((axis + a.ndim,) for axis in axes)
    return lax.dot_general(
        a, b, ((left, right), (batch, batch)), preferred_element_type=jnp.float32
    )


def dot(a: Array, b: Array, *, axes: tuple[int, int]) -> Array:
    """Return `contract(a, b, axes=axes)` in a form that XLA:CPU computes in low precision.

    XLA:CPU computes in float32 unless the first operand is contracted along its last axis and both
    are laid out in memory as their shapes state. Merging the leading axes copies heads that a
    transpose split off into that order.
    """
    batch = a.shape[:-2]
    if batch:
        a, b = (x.reshape(math.prod(batch), *x.shape[-2:]) for x in (a, b))
    y = _dot_general(swap_last_axes(a) if axes[0] == -2 else a, b, axes=(-1, axes[1]))
    return y.reshape(*batch, *y.shape[-2:])


def swap_last_axes(x: Shaped[Array, "*n i j"]) -> Shaped[Array, "*n j i"]:
    """Swap the last two axes in two steps, so that XLA:CPU cannot fold a transpose into a product.

    With a folded transpose, a low-precision product would sum along columns, which XLA:CPU
    computes in float32.
    """
    *n, i, j = x.shape
    step = math.gcd(j, 32)
    return jnp.moveaxis(x.reshape(*n, i, j // step, step), -3, -1).reshape(*n, j, i)


def shifted_depthwise_conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw 1 c"],
    stride: int,
    *,
    hand_written_gradients: bool = True,
) -> Float[Array, "b oh ow c"]:
    """Compute a depthwise convolution with SAME padding as kh·kw shifted multiply-adds.

    XLA:CPU runs this ten times faster than a grouped convolution. `hand_written_gradients` uses
    less memory, and supports reverse mode only.
    """
    if hand_written_gradients:
        return cast(Array, _shifted_with_vjp(x, kernel, stride))
    return _shifted(x, kernel, stride)


def _shifted(x: Array, kernel: Array, stride: int) -> Array:
    out = [-(-size // stride) for size in x.shape[1:3]]
    return _sum_windows(_pad_same(x, kernel.shape[0], stride), kernel, out, stride)


def _shifted_forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _shifted(x, kernel, stride), (x, kernel)


def _shifted_backward(stride: int, residuals: tuple[Array, Array], g: Array) -> tuple[Any, ...]:
    """Return the gradients of `_shifted`.

    Autodiff saves or sums kh·kw maps of the input's size. Here the gradient of the input is the
    same sum over windows, with the kernel flipped and the strides filled with zeros. The gradient
    of the kernel is summed image by image, so that an image's windows stay in the processor's
    cache.
    """
    x, kernel = residuals
    k, (h, w), (oh, ow) = kernel.shape[0], x.shape[1:3], g.shape[1:3]

    def add_image(total: Array, image: tuple[Array, Array]) -> tuple[Array, None]:
        padded, cotangent = image
        windows = _shifted_windows(k, (oh, ow), stride)
        sums = [(padded[rows, columns] * cotangent).sum((0, 1)) for rows, columns in windows]
        return total + jnp.stack(sums), None

    zeros = jnp.zeros((k * k, kernel.shape[-1]), kernel.dtype)
    kernel_grad, _ = lax.scan(add_image, zeros, (_pad_same(x, k, stride), g))

    def dilation(size: int, out: int) -> tuple[int, int, int]:
        low = k - 1 - same_padding(size, k, stride)[0]
        return low, size + k - 1 - low - ((out - 1) * stride + 1), stride - 1

    zero = jnp.zeros((), g.dtype)
    g = lax.pad(g, zero, ((0, 0, 0), dilation(h, oh), dilation(w, ow), (0, 0, 0)))
    return _sum_windows(g, kernel[::-1, ::-1], (h, w), 1), kernel_grad.reshape(kernel.shape)


_shifted_with_vjp = jax.custom_vjp(_shifted, nondiff_argnums=(2,))
_shifted_with_vjp.defvjp(_shifted_forward, _shifted_backward)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return TensorFlow's SAME padding before and after an axis; an odd pixel goes after.

    At stride 2, PyTorch's symmetric kernel//2 differs.
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _pad_same(x: Array, k: int, stride: int) -> Array:
    h, w = x.shape[1:3]
    return jnp.pad(x, ((0, 0), same_padding(h, k, stride), same_padding(w, k, stride), (0, 0)))


def _shifted_windows(k: int, out: Sequence[int], stride: int) -> list[tuple[slice, slice]]:
    """Return, for each of the k·k kernel entries, the rows and columns of a padded map it reads."""
    rows, columns = (
        [slice(i, i + (size - 1) * stride + 1, stride) for i in range(k)] for size in out
    )
    return list(itertools.product(rows, columns))


def _sum_windows(x: Array, kernel: Array, out: Sequence[int], stride: int) -> Array:
    k, c = kernel.shape[0], kernel.shape[-1]
    taps = zip(_shifted_windows(k, out, stride), kernel.reshape(k * k, 1, 1, 1, c), strict=True)
    return functools.reduce(operator.add, (x[:, i, j] * weights for (i, j), weights in taps))
