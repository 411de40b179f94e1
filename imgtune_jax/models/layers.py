"""What every transformer tower is made of: dense, norm, attention, MLP, block.

Parameters are float32. `dtype` is the type of matrix-product operands only: products accumulate
in float32 and everything element-wise (norm, softmax, activation, residual) stays float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.models import init

Dtype = Any
Constrain = Callable[[Array, tuple[str | None, ...]], Array]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI CLIP's
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
}

RESIDUAL = ("batch", "length", "embed")  # logical axes of the residual stream


def no_constraint(x: Array, axes: tuple[str | None, ...]) -> Array:
    """The default of every `constrain` field: leaves placement to the compiler."""
    del axes
    return x


def activation(name: str) -> Callable[[Array], Array]:
    """The element-wise function of that name. Raises ValueError for an unknown one."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def over_last(vector: Float[Array, " d"], like: Array) -> Array:
    """The vector as [1 … 1 d] of `like`'s rank: no rank is promoted silently in this house."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: Array, kernel: Array, dtype: Dtype) -> Array:
    return _matmul_forward(x, kernel, dtype)[0]


def _matmul_forward(x: Array, kernel: Array, dtype: Dtype) -> tuple[Array, Any]:
    low = x.astype(dtype), kernel.astype(dtype)
    y = lax.dot_general(*low, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    # Empty arrays remember the operands' own types for the cotangents.
    return y, (*low, jnp.empty(0, x.dtype), jnp.empty(0, kernel.dtype))


def _matmul_backward(dtype: Dtype, residuals: Any, g: Array) -> tuple[Array, Array]:
    x, kernel, x_type, kernel_type = residuals
    # Without this rule autodiff multiplies a float32 cotangent with low-precision operands, which
    # no matrix unit does: it would run in float32.
    g = g.astype(dtype)
    dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
    rows = tuple(range(x.ndim - 1))
    dx = dot(g, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    dkernel = dot(x, g, ((rows, rows), ((), ())))
    return dx.astype(x_type.dtype), dkernel.astype(kernel_type.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def dense(
    x: Float[Array, "*n i"],
    kernel: Float[Array, "i o"],
    bias: Float[Array, " o"] | None = None,
    *,
    dtype: Dtype = jnp.float32,
) -> Float[Array, "*n o"]:
    """`x @ kernel + bias`, operands in `dtype`, sums and result in float32."""
    if jnp.dtype(dtype) == jnp.float32:
        y = x.astype(jnp.float32) @ kernel.astype(jnp.float32)
    else:
        y = cast(Array, _matmul(x, kernel, jnp.dtype(dtype)))
    return y if bias is None else y + over_last(bias, y)


def attention(
    q: Float[Array, "b lq k d"],
    k: Float[Array, "b lk k d"],
    v: Float[Array, "b lk k d"],
    *,
    mask: Bool[Array, "b lk"] | None = None,
    causal: bool = False,
) -> Float[Array, "b lq k d"]:
    """Scaled dot-product attention (1706.03762, eq. 1) with a float32 softmax.

    `mask` is False for keys that nobody may look at; a row with no visible key averages all of
    them instead of giving NaN. With `causal`, position i sees positions up to i.
    """
    full = None if mask is None else mask[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=full, is_causal=causal)


class Dense(nn.Module):
    """An affine map over the last axis; parameters `kernel` [i o] and `bias` [o]."""

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    kernel_init: init.Initializer = init.XAVIER
    bias_init: init.Initializer = init.ZEROS

    @nn.compact
    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        return dense(x, kernel, bias, dtype=self.dtype)


class Embed(nn.Module):
    """Rows of a table, `embedding` [v d]. An id outside of it gives NaN, not another token."""

    num_embeddings: int
    features: int
    table_init: init.Initializer = init.normal(0.02)

    @nn.compact
    def __call__(self, ids: Int[Array, "*n"]) -> Float[Array, "*n d"]:
        shape = (self.num_embeddings, self.features)
        table = self.param("embedding", self.table_init, shape, jnp.float32)
        return jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis (1607.06450), in float32; `scale` and `bias`."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        scale = self.param("scale", init.ONES, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", init.ZEROS, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        # E[(x-m)^2], not E[x^2]-m^2: the latter cancels when the mean is large.
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * lax.rsqrt(variance + self.epsilon)
        return y * over_last(scale, y) + over_last(bias, y)


class Attention(nn.Module):
    """Multi-head attention with q, k, v, out projections, kernels [d d].

    Self-attention, or from `x` to `context` (whose width may differ). `causal` as in `attention`.
    Raises ValueError if the width does not divide over the heads.
    """

    num_heads: int
    causal: bool = False
    dtype: Dtype = jnp.float32
    kernel_init: init.Initializer = init.XAVIER

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b lq d"],
        context: Float[Array, "b lk dc"] | None = None,
        *,
        mask: Bool[Array, "b lk"] | None = None,
    ) -> Float[Array, "b lq d"]:
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(
                f"width {width} does not divide over {self.num_heads} heads; "
                "set num_heads to a divisor of the width"
            )
        linear = functools.partial(
            Dense, width, dtype=self.dtype, kernel_init=self.kernel_init, parent=self
        )

        def heads(name: str, y: Array) -> Array:
            projected = linear(name=name)(y).astype(self.dtype)
            return projected.reshape(*y.shape[:-1], self.num_heads, width // self.num_heads)

        source = x if context is None else context
        q, k, v = heads("q", x), heads("k", source), heads("v", source)
        y = attention(q, k, v, mask=mask, causal=self.causal)
        return linear(name="out")(y.reshape(x.shape))


class MlpBlock(nn.Module):
    """fc2(act(fc1(x))), back to the width of x; dropout after the activation."""

    mlp_dim: int
    act: str = "gelu"
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    kernel_init: init.Initializer = init.XAVIER

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"], *, train: bool) -> Float[Array, "*n d"]:
        linear = functools.partial(
            Dense, dtype=self.dtype, kernel_init=self.kernel_init, parent=self
        )
        y = activation(self.act)(linear(self.mlp_dim, name="fc1")(x))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return linear(x.shape[-1], name="fc2")(y)


class Block(nn.Module):
    """One transformer layer: attention and MLP, each with a residual and a norm.

    `post_norm=False` normalises a branch's input (ViT, CLIP); True normalises the sum (BERT).
    Dropout is applied to both branches' outputs and inside the MLP.
    """

    num_heads: int
    mlp_dim: int
    causal: bool = False
    post_norm: bool = False
    act: str = "gelu"
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    kernel_init: init.Initializer = init.XAVIER

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None, *, train: bool
    ) -> Float[Array, "b l d"]:
        norm1 = LayerNorm(self.norm_epsilon, name="norm1")
        norm2 = LayerNorm(self.norm_epsilon, name="norm2")
        drop = nn.Dropout(self.dropout, deterministic=not train)
        common = dict(dtype=self.dtype, kernel_init=self.kernel_init)
        attn = Attention(self.num_heads, self.causal, name="attn", **common)
        mlp = MlpBlock(self.mlp_dim, self.act, self.dropout, name="mlp", **common)
        if self.post_norm:
            x = norm1(x + drop(attn(x, mask=mask)))
            return norm2(x + drop(mlp(x, train=train)))
        x = x + drop(attn(norm1(x), mask=mask))
        return x + drop(mlp(norm2(x), train=train))
