"""Layers that every transformer uses: dense, attention, normalization, embedding.

Parameters are float32. `dtype` is the type of matrix-product operands only: products accumulate
in float32, and all element-wise operations (norm, softmax, activation, residual) are float32.
`hand_written_gradients=True` supports reverse mode only (see `gradients.py`); False supports
`jax.jvp` and `jax.linearize` too, with the same values.

Axis letters: *n any leading axes, i inputs, o outputs, lq queries, lk keys. In `attention`, d is
the width of one head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.errors import UserError
from imgtune_jax.models import gradients, initializers
from imgtune_jax.models.gradients import Dtype, center_and_rstd, expand_like
from imgtune_jax.xla_cpu import contract

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # of OpenAI's CLIP
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
}

RESIDUAL_AXES = ("batch", "length", "embed")  # logical axes of the residual stream


def activation(name: str) -> Callable[[Array], Array]:
    """Return an activation function by name. Raises UserError for an unknown name."""
    if name not in ACTIVATIONS:
        raise UserError(f"activation {name!r} is not one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def dense(
    x: Float[Array, "*n i"],
    kernel: Float[Array, "i o"],
    bias: Float[Array, " o"] | None = None,
    *,
    dtype: Dtype = jnp.float32,
    hand_written_gradients: bool = True,
) -> Float[Array, "*n o"]:
    """Return `x @ kernel + bias`, with operands in `dtype` and sums and result in float32."""
    # One row axis: to sum the kernel's gradient over two, XLA:CPU would transpose both operands.
    rows = x.reshape(-1, x.shape[-1])
    matmul = _matmul_with_vjp if hand_written_gradients else _matmul
    y = cast(Array, matmul(rows, kernel, jnp.dtype(dtype)))
    y = y if bias is None else y + expand_like(bias, y)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _matmul(x: Array, kernel: Array, dtype: Dtype) -> Array:
    return contract(x.astype(dtype), kernel.astype(dtype), axes=(-1, -2))


def _matmul_forward(x: Array, kernel: Array, dtype: Dtype) -> tuple[Array, Any]:
    low_x, low_kernel = x.astype(dtype), kernel.astype(dtype)
    # Empty arrays record the types of x and kernel, in which the gradients are returned.
    like_x, like_kernel = jnp.empty(0, x.dtype), jnp.empty(0, kernel.dtype)
    y = contract(low_x, low_kernel, axes=(-1, -2))
    return y, (low_x, low_kernel, like_x, like_kernel)


_matmul_with_vjp = jax.custom_vjp(_matmul, nondiff_argnums=(2,))
_matmul_with_vjp.defvjp(_matmul_forward, gradients.matmul_backward)


def attention(
    q: Float[Array, "b k lq d"],
    k: Float[Array, "b k lk d"],
    v: Float[Array, "b k lk d"],
    *,
    mask: Bool[Array, "b lk"] | Bool[Array, "b lq lk"] | None = None,
    causal: bool = False,
    hand_written_gradients: bool = True,
) -> Float[Array, "b k lq d"]:
    """Scaled dot-product attention (1706.03762, eq. 1) of k heads, with a float32 softmax.

    `mask` is False for keys [b lk], or for pairs of query and key [b lq lk], that are not attended
    to. A query that may attend to no key returns the mean of all values, not NaN. With `causal`,
    position i attends to positions up to i. The head axis precedes the position axis, since XLA
    would otherwise transpose the operands of each product.
    """
    visible = None
    if mask is not None:
        visible = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
    if causal:
        past = jnp.tril(jnp.ones((q.shape[2], k.shape[2]), bool))[None, None]
        visible = past if visible is None else visible & past
    attend = _attend_with_vjp if hand_written_gradients else _attend
    return cast(Array, attend(q, k, v, visible))


def _attend(q: Array, k: Array, v: Array, visible: Array | None) -> Array:
    return _attend_forward(q, k, v, visible)[0]


def _attend_forward(
    q: Array, k: Array, v: Array, visible: Array | None
) -> tuple[Array, tuple[Array | None, ...]]:
    scores = contract(q, k, axes=(-1, -1)) * q.shape[-1] ** -0.5
    if visible is not None:
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    y = contract(weights, v, axes=(-1, -2)).astype(v.dtype)
    return y, (q, k, v, visible, weights, y)


_attend_with_vjp = jax.custom_vjp(_attend)
_attend_with_vjp.defvjp(_attend_forward, gradients.attention_backward)


def layer_norm(
    x: Float[Array, "*n d"],
    scale: Float[Array, " d"],
    bias: Float[Array, " d"],
    epsilon: float,
    *,
    hand_written_gradients: bool = True,
) -> Float[Array, "*n d"]:
    """Layer normalization over the last axis (1607.06450), in float32."""
    normalize = _layer_norm_with_vjp if hand_written_gradients else _layer_norm
    return cast(Array, normalize(x, scale, bias, epsilon))


def _layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    centered, rstd = center_and_rstd(x, epsilon)
    return centered * rstd * expand_like(scale, x) + expand_like(bias, x)


def _layer_norm_forward(
    x: Array, scale: Array, bias: Array, epsilon: float
) -> tuple[Array, tuple[Array, Array]]:
    return _layer_norm(x, scale, bias, epsilon), (x, scale)


_layer_norm_with_vjp = jax.custom_vjp(_layer_norm, nondiff_argnums=(3,))
_layer_norm_with_vjp.defvjp(_layer_norm_forward, gradients.layer_norm_backward)


class Dense(nn.Module):
    """An affine map over the last axis, with parameters `kernel` [i o] and `bias` [o]."""

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    kernel_init: initializers.Initializer = initializers.XAVIER_NORMAL
    bias_init: initializers.Initializer = initializers.ZEROS
    hand_written_gradients: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        kernel = initializers.param(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = None
        if self.use_bias:
            bias = initializers.param(self, "bias", self.bias_init, (self.features,))
        return dense(
            x,
            kernel,
            bias,
            dtype=self.dtype,
            hand_written_gradients=self.hand_written_gradients,
        )


def lookup(table: Float[Array, "v d"], ids: Int[Array, "*n"]) -> Float[Array, "*n d"]:
    """Return the rows of `table` at `ids`. The row of an id outside 0 to v - 1 is NaN."""
    ids = jnp.where(ids < 0, len(table), ids)  # `take` counts negative ids from the end
    return jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan)


class Embed(nn.Module):
    """A table of embeddings, `embedding` [v d]. The embedding of an id outside the table is NaN."""

    num_embeddings: int
    features: int
    table_init: initializers.Initializer = initializers.Normal(0.02)

    @nn.compact
    def __call__(self, ids: Int[Array, "*n"]) -> Float[Array, "*n d"]:
        shape = (self.num_embeddings, self.features)
        table = initializers.param(self, "embedding", self.table_init, shape)
        return lookup(table, ids)


class LayerNorm(nn.Module):
    """`layer_norm` with the parameters `scale` and, if `use_bias`, `bias` [d]."""

    epsilon: float = 1e-6
    hand_written_gradients: bool = True
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        scale = initializers.param(self, "scale", initializers.ONES, (x.shape[-1],))
        bias = jnp.zeros(x.shape[-1], jnp.float32)
        if self.use_bias:
            bias = initializers.param(self, "bias", initializers.ZEROS, (x.shape[-1],))
        x, manual = x.astype(jnp.float32), self.hand_written_gradients
        return layer_norm(x, scale, bias, self.epsilon, hand_written_gradients=manual)
