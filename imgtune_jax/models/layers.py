"""What every transformer is made of: dense, norm, attention; `block.py` has the layer.

Parameters are float32. `dtype` is the type of matrix-product operands only: products accumulate
in float32 and everything element-wise (norm, softmax, activation, residual) stays float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from imgtune_jax.models import initializers

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

RESIDUAL_AXES = ("batch", "length", "embed")  # logical axes of the residual stream


def no_constraint(x: Array, axes: tuple[str | None, ...]) -> Array:
    """The default of every `constrain` field: leaves placement to the compiler."""
    del axes
    return x


def activation(name: str) -> Callable[[Array], Array]:
    """The element-wise function of that name. Raises ValueError for an unknown one."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def expand_like(vector: Float[Array, " d"], like: Array) -> Array:
    """The vector as [1 … 1 d] of `like`'s rank: no rank is promoted silently in this house."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(
    x: Float[Array, "n i"], kernel: Float[Array, "i o"], dtype: Dtype
) -> Float[Array, "n o"]:
    return _matmul_forward(x, kernel, dtype)[0]


def _matmul_forward(x: Array, kernel: Array, dtype: Dtype) -> tuple[Array, Any]:
    low = x.astype(dtype), kernel.astype(dtype)
    # Empty arrays remember the operands' own types for the cotangents.
    empty = jnp.empty(0, x.dtype), jnp.empty(0, kernel.dtype)
    return _contract(*low, axes=(-1, -2)), (*low, *empty)


def _matmul_backward(dtype: Dtype, residuals: Any, g: Array) -> tuple[Array, Array]:
    x, kernel, x_type, kernel_type = residuals
    # Without this rule autodiff multiplies a float32 cotangent with low-precision operands, which
    # no matrix unit does: it would run in float32.
    g = g.astype(dtype)
    dx, dkernel = _contract(g, kernel, axes=(-1, -1)), _contract(x, g, axes=(-2, -2))
    return dx.astype(x_type.dtype), dkernel.astype(kernel_type.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _contract(a: Array, b: Array, *, axes: tuple[int, int]) -> Array:
    """The sum along one axis of each, -1 (rows) or -2 (columns), in float32.

    What lies before the last two axes is shared.
    """
    dot = functools.partial(_dot, axes=axes)
    if a.dtype == jnp.float32:
        return dot(a, b)
    return lax.platform_dependent(a, b, cpu=functools.partial(_dot_on_cpu, axes=axes), default=dot)


def _dot(a: Array, b: Array, *, axes: tuple[int, int]) -> Array:
    shared = tuple(range(a.ndim - 2))
    one, other = ((axis + a.ndim,) for axis in axes)
    return lax.dot_general(
        a, b, ((one, other), (shared, shared)), preferred_element_type=jnp.float32
    )


def _dot_on_cpu(a: Array, b: Array, *, axes: tuple[int, int]) -> Array:
    """`_dot` in a form that XLA:CPU computes in low precision, and not in float32.

    That wants the first operand by row, and both as they lie in memory: heads that were split off
    by a transpose are copied into their order where their axis is made one with the batch's.
    """
    shared = a.shape[:-2]
    if shared:
        a, b = (x.reshape(math.prod(shared), *x.shape[-2:]) for x in (a, b))
    y = _dot(_turned(a) if axes[0] == -2 else a, b, axes=(-1, axes[1]))
    return y.reshape(*shared, *y.shape[-2:])


def _turned(x: Shaped[Array, "*n i j"]) -> Shaped[Array, "*n j i"]:
    """The last two axes swapped, j in two steps: XLA:CPU finds no transpose to fold into a product.

    Folded, a product in low precision sums along columns; that it computes in float32.
    """
    *n, i, j = x.shape
    step = math.gcd(j, 32)
    return jnp.moveaxis(x.reshape(*n, i, j // step, step), -3, -1).reshape(*n, j, i)


def dense(
    x: Float[Array, "*n i"],
    kernel: Float[Array, "i o"],
    bias: Float[Array, " o"] | None = None,
    *,
    dtype: Dtype = jnp.float32,
) -> Float[Array, "*n o"]:
    """`x @ kernel + bias`, operands in `dtype`, sums and result in float32."""
    # As rows: where the kernel's gradient is a sum over two axes, XLA:CPU transposes both first.
    rows = x.reshape(-1, x.shape[-1])
    y = cast(Array, _matmul(rows, kernel, jnp.dtype(dtype)))
    y = y if bias is None else y + expand_like(bias, y)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def attention(
    q: Float[Array, "b k lq d"],
    k: Float[Array, "b k lk d"],
    v: Float[Array, "b k lk d"],
    *,
    mask: Bool[Array, "b lk"] | Bool[Array, "b lq lk"] | None = None,
    causal: bool = False,
) -> Float[Array, "b k lq d"]:
    """Scaled dot-product attention (1706.03762, eq. 1) of k heads, with a float32 softmax.

    `mask` is False for keys that nobody, or that a query, may not look at; a row with no visible
    key averages all of them instead of giving NaN. With `causal`, position i sees positions up
    to i. All is by head, as its products read it: in another order they transpose it each time.
    """
    visible = None
    if mask is not None:
        visible = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
    if causal:
        past = jnp.tril(jnp.ones((q.shape[2], k.shape[2]), bool))[None, None]
        visible = past if visible is None else visible & past
    return cast(Array, _attention(q, k, v, visible))


@jax.custom_vjp
def _attention(q: Array, k: Array, v: Array, visible: Array | None) -> Array:
    """Its gradient is written out (2205.14135, appendix B.2): faster than autodiff's on XLA:CPU,
    and in low precision a product of the type of its operands, as `_matmul`'s."""
    return _attention_forward(q, k, v, visible)[0]


def _attention_forward(
    q: Array, k: Array, v: Array, visible: Array | None
) -> tuple[Array, tuple[Array | None, ...]]:
    scores = _contract(q, k, axes=(-1, -1)) * q.shape[-1] ** -0.5
    if visible is not None:
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    y = _contract(weights, v, axes=(-1, -2)).astype(v.dtype)
    return y, (q, k, v, visible, weights, y)


def _attention_backward(residuals: Any, g: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, visible, weights, y = residuals
    dv = _contract(weights, g, axes=(-2, -2))
    along = (g.astype(jnp.float32) * y).sum(-1, keepdims=True)
    dscores = weights * (_contract(g, v, axes=(-1, -1)) - along) * q.shape[-1] ** -0.5
    if visible is not None:
        dscores = jnp.where(visible, dscores, 0.0)
    dscores = dscores.astype(q.dtype)
    dq, dk = _contract(dscores, k, axes=(-1, -2)), _contract(dscores, q, axes=(-2, -2))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)


class Dense(nn.Module):
    """An affine map over the last axis; parameters `kernel` [i o] and `bias` [o]."""

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    kernel_init: initializers.Initializer = initializers.XAVIER_NORMAL
    bias_init: initializers.Initializer = initializers.ZEROS

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
    table_init: initializers.Initializer = initializers.normal(0.02)

    @nn.compact
    def __call__(self, ids: Int[Array, "*n"]) -> Float[Array, "*n d"]:
        shape = (self.num_embeddings, self.features)
        table = self.param("embedding", self.table_init, shape, jnp.float32)
        return jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan)


def _center_and_rstd(x: Array, epsilon: float) -> tuple[Array, Array]:
    """x without its mean, and the reciprocal of its standard deviation."""
    # E[(x-m)^2], not E[x^2]-m^2: the latter cancels when the mean is large.
    centred = x - x.mean(-1, keepdims=True)
    return centred, lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*n d"], scale: Float[Array, " d"], bias: Float[Array, " d"], epsilon: float
) -> Float[Array, "*n d"]:
    """Layer normalisation over the last axis (1607.06450), all in float32.

    Its gradient is written out: it keeps x alone, and XLA:CPU takes longer for autodiff's.
    """
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(
    x: Array, scale: Array, bias: Array, epsilon: float
) -> tuple[Array, tuple[Array, Array]]:
    centred, reciprocal = _center_and_rstd(x, epsilon)
    return centred * reciprocal * expand_like(scale, x) + expand_like(bias, x), (x, scale)


def _layer_norm_backward(
    epsilon: float, residuals: tuple[Array, Array], g: Array
) -> tuple[Array, Array, Array]:
    x, scale = residuals
    centred, reciprocal = _center_and_rstd(x, epsilon)
    y, rows = centred * reciprocal, tuple(range(x.ndim - 1))
    gy = g * y

    def mean_scaled(z: Array) -> Array:
        # As a product: for a sum of products XLA:CPU writes the scale out to the size of x.
        return jnp.dot(z, scale, precision="highest")[..., None] / x.shape[-1]

    dx = reciprocal * (g * expand_like(scale, x) - mean_scaled(g) - y * mean_scaled(gy))
    return dx, gy.sum(rows), g.sum(rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
    """`layer_norm` with parameters `scale` and `bias`."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        scale = self.param("scale", initializers.ONES, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", initializers.ZEROS, (x.shape[-1],), jnp.float32)
        return layer_norm(x.astype(jnp.float32), scale, bias, self.epsilon)


class KVCache(NamedTuple):
    """What attention looks at, by head: kept from one decoding step to the next."""

    k: Float[Array, "b k l d"]
    v: Float[Array, "b k l d"]

    @classmethod
    def init(cls, batch: int, length: int, *, num_heads: int, width: int, dtype: Dtype):
        """Room for `length` positions."""
        shape = (batch, num_heads, length, width // num_heads)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def update(self, new: KVCache, position: Int[Array, " b"]) -> KVCache:
        """With each row's one new entry at its position; one beyond the room is dropped."""
        # Row by row: indices over all rows would have every device gather the others' rows.
        write = jax.vmap(lambda old, at, x: old.at[:, at].set(x[:, 0], mode="drop"))
        return KVCache(*(write(old, position, x) for old, x in zip(self, new, strict=True)))


class Attention(nn.Module):
    """Multi-head attention with q, k, v, out projections, kernels [d d].

    Self-attention, or from `x` to `context` (whose width may differ). `causal` as in `attention`.
    `known` is what was computed before and replaces the context; with `position`, the entries of
    x, one a row, are written into it there, and attention sees what is up to there.
    Raises ValueError if the width does not divide over the heads.
    """

    num_heads: int
    causal: bool = False
    dtype: Dtype = jnp.float32
    kernel_init: initializers.Initializer = initializers.XAVIER_NORMAL

    def __call__(
        self,
        x: Float[Array, "b lq d"],
        context: Float[Array, "b lk dc"] | None = None,
        *,
        mask: Bool[Array, "b lk"] | Bool[Array, "b lq lk"] | None = None,
    ) -> Float[Array, "b lq d"]:
        return self.attend(x, context, mask=mask)[0]

    @nn.compact
    def attend(
        self,
        x: Float[Array, "b lq d"],
        context: Float[Array, "b lk dc"] | None = None,
        *,
        mask: Bool[Array, "b lk"] | Bool[Array, "b lq lk"] | None = None,
        kv_cache: KVCache | None = None,
        position: Int[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b lq d"], KVCache]:
        """The output, and the keys and values that it was made from."""
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
            return self._heads(linear(name=name)(y))

        q, causal = heads("q", x), self.causal
        if kv_cache is None:
            source = x if context is None else context
            kv_cache = KVCache(heads("k", source), heads("v", source))
        else:
            causal = False
            if position is not None:
                kv_cache = kv_cache.update(KVCache(heads("k", x), heads("v", x)), position)
                mask = jnp.arange(kv_cache.k.shape[2])[None] <= position[:, None]
        y = attention(q, *kv_cache, mask=mask, causal=causal)
        return linear(name="out")(y.swapaxes(1, 2).reshape(x.shape)), kv_cache

    def project_kv(self, context: Float[Array, "b lk dc"]) -> KVCache:
        """What `attend` computes of a context, to be given back to it as `known`."""
        own = self.variables["params"]
        return KVCache(
            *(
                self._heads(dense(context, own[n]["kernel"], own[n]["bias"], dtype=self.dtype))
                for n in ("k", "v")
            )
        )

    def _heads(self, y: Float[Array, "b l d"]) -> Float[Array, "b k l c"]:
        shape = (*y.shape[:-1], self.num_heads, y.shape[-1] // self.num_heads)
        return y.astype(self.dtype).reshape(shape).swapaxes(1, 2)
