"""Hand-written backward passes, and functions that they share with the forward passes.

They exist for two reasons. In low precision, autodiff would multiply a float32 cotangent by a
low-precision operand. Matrix units cannot mix types, so that product would run in float32. And
XLA:CPU compiles autodiff's gradients of attention and layer normalization to slower code. A
function with a hand-written gradient supports reverse mode only; `hand_written_gradients=False`
selects the same function with autodiff's gradients. In all functions here, `g` is the cotangent of
the output.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from imgtune_jax.xla_cpu import contract

Dtype = Any


def expand_like(vector: Float[Array, " d"], like: Array) -> Array:
    """Reshape a vector to [1 … 1 d] with the rank of `like`, to avoid implicit rank promotion."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def center_and_rstd(x: Array, epsilon: float) -> tuple[Array, Array]:
    """Return x minus its mean over the last axis, and rstd = 1 / sqrt(variance + epsilon)."""
    # E[(x - mean)²], since E[x²] - mean² loses precision when the mean is large.
    centered = x - x.mean(-1, keepdims=True)
    return centered, lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + epsilon)


def matmul_backward(dtype: Dtype, residuals: Any, g: Array) -> tuple[Array, Array]:
    """Return the gradients of `x @ kernel`, with operands in `dtype`.

    The residuals are x and kernel in `dtype`, and two empty arrays of their original types.
    """
    x, kernel, like_x, like_kernel = residuals
    g = g.astype(dtype)
    dx, dkernel = contract(g, kernel, axes=(-1, -1)), contract(x, g, axes=(-2, -2))
    return dx.astype(like_x.dtype), dkernel.astype(like_kernel.dtype)


def attention_backward(residuals: Any, g: Array) -> tuple[Array, Array, Array, None]:
    """Return the gradients of attention with respect to q, k and v (2205.14135, appendix B.2).

    The residuals are q, k, v, the mask `visible` or None, the attention weights and the output.
    """
    q, k, v, visible, weights, y = residuals
    dv = contract(weights, g, axes=(-2, -2))
    weighted_mean = (g.astype(jnp.float32) * y).sum(-1, keepdims=True)
    dscores = weights * (contract(g, v, axes=(-1, -1)) - weighted_mean) * q.shape[-1] ** -0.5
    if visible is not None:
        dscores = jnp.where(visible, dscores, 0.0)
    dscores = dscores.astype(q.dtype)
    dq, dk = contract(dscores, k, axes=(-1, -2)), contract(dscores, q, axes=(-2, -2))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


def layer_norm_backward(
    epsilon: float, residuals: tuple[Array, Array], g: Array
) -> tuple[Array, Array, Array]:
    """Return the gradients of layer normalization. The residuals are x and scale."""
    x, scale = residuals
    centered, rstd = center_and_rstd(x, epsilon)
    y, rows = centered * rstd, tuple(range(x.ndim - 1))
    gy = g * y

    def mean_scaled(z: Array) -> Array:
        # A matrix product: for (z * scale).sum(), XLA:CPU would expand scale to the size of x.
        return jnp.dot(z, scale, precision="highest")[..., None] / x.shape[-1]

    dx = rstd * (g * expand_like(scale, x) - mean_scaled(g) - y * mean_scaled(gy))
    return dx, gy.sum(rows), g.sum(rows)
