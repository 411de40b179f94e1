"""Forms of operations for XLA:CPU, and functions that tell when they are needed.

All other modules are written for accelerators. Each form here returns the same values as the
general form; tests compare them.

Axis letters: kh × kw kernel size, oh × ow output size, *n any leading axes. Matrices are [i j] and
[k l]; their product has r rows and c columns.
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

CONV_BATCH = 16  # rows; EfficientNet-Lite is 1.35 times as fast with 16 rows as with 512


def is_backend() -> bool:
    """Return whether programs run on XLA:CPU by default."""
    return jax.default_backend() == "cpu"


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, bool]:
    """Return the compiler options of a training step on a mesh, in addition to the defaults.

    On several CPU devices, XLA's concurrency-optimized scheduler lets each device choose the order
    of independent collectives. Two devices can then wait in different collectives, until a time-out
    aborts the process. That happened in 4 of 6 runs of coca_emoji on a mesh with data=4, tensor=2;
    without the scheduler, in 0 of 8.
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
    """Return f(*inputs). Each row of the output must depend only on that row of the inputs.

    On one CPU device, f runs on `CONV_BATCH` rows at a time, whose feature maps fit into the
    processor's cache. A batch whose size is not a multiple of `CONV_BATCH` runs at once.
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
    """Return a matrix product in float32 that sums over one axis, -1 or -2, of each operand.

    Leading axes are batch axes. On a CPU, operands of lower precision use the form `dot`.
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

    XLA:CPU computes in float32 unless the sum is over the last axis of the first operand and both
    operands are stored in row-major order. Heads that were split off by a transpose are not in
    that order; merging the leading axes copies them into it.
    """
    batch = a.shape[:-2]
    if batch:
        a, b = (x.reshape(math.prod(batch), *x.shape[-2:]) for x in (a, b))
    y = _dot_general(swap_last_axes(a) if axes[0] == -2 else a, b, axes=(-1, axes[1]))
    return y.reshape(*batch, *y.shape[-2:])


def swap_last_axes(x: Shaped[Array, "*n i j"]) -> Shaped[Array, "*n j i"]:
    """Swap the last two axes in two steps, so that XLA:CPU cannot fold a transpose into a product.

    With a folded transpose, a low-precision product would sum over axis -2 of its first operand,
    which XLA:CPU computes in float32.
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

    XLA:CPU runs this ten times faster than a grouped convolution. `hand_written_gradients=True`
    uses less memory, and supports reverse mode only.
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

    Autodiff would save or sum kh·kw maps of the size of the input. Here the gradient of the input
    is a sum over windows as in the forward pass, with the kernel flipped and the strides filled
    with zeros. The gradient of the kernel is summed image by image, so that an image's windows stay
    in the processor's cache.
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

    def padding(size: int, out: int) -> tuple[int, int, int]:
        low = k - 1 - same_padding(size, k, stride)[0]
        return low, size + k - 1 - low - ((out - 1) * stride + 1), stride - 1

    zero = jnp.zeros((), g.dtype)
    g = lax.pad(g, zero, ((0, 0, 0), padding(h, oh), padding(w, ow), (0, 0, 0)))
    return _sum_windows(g, kernel[::-1, ::-1], (h, w), 1), kernel_grad.reshape(kernel.shape)


_shifted_with_vjp = jax.custom_vjp(_shifted, nondiff_argnums=(2,))
_shifted_with_vjp.defvjp(_shifted_forward, _shifted_backward)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return TensorFlow's SAME padding before and after an axis; an odd pixel goes after.

    At stride 2, PyTorch's symmetric padding by kernel // 2 differs.
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _pad_same(x: Array, k: int, stride: int) -> Array:
    h, w = x.shape[1:3]
    return jnp.pad(x, ((0, 0), same_padding(h, k, stride), same_padding(w, k, stride), (0, 0)))


def _shifted_windows(k: int, out: Sequence[int], stride: int) -> list[tuple[slice, slice]]:
    """Return the rows and columns of a padded map that each of k·k kernel entries multiplies."""
    rows, columns = (
        [slice(i, i + (size - 1) * stride + 1, stride) for i in range(k)] for size in out
    )
    return list(itertools.product(rows, columns))


def _sum_windows(x: Array, kernel: Array, out: Sequence[int], stride: int) -> Array:
    k, c = kernel.shape[0], kernel.shape[-1]
    windows, weights = _shifted_windows(k, out, stride), kernel.reshape(k * k, 1, 1, 1, c)
    taps = zip(windows, weights, strict=True)
    return functools.reduce(
        operator.add, (x[:, rows, columns] * weight for (rows, columns), weight in taps)
    )
