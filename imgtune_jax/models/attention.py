"""Multi-head attention with its projections, and the cache of keys and values for decoding.

Axis letters: lq queries, lk keys, dc width of the context, c = d / k width of one head.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.errors import UserError
from imgtune_jax.models import initializers
from imgtune_jax.models.layers import Dense, Dtype, attention, dense


class KVCache(NamedTuple):
    """Keys `k` and values `v` at l positions, retained from one decoding step to the next."""

    k: Float[Array, "b k l c"]
    v: Float[Array, "b k l c"]

    @classmethod
    def init(cls, batch: int, length: int, *, num_heads: int, width: int, dtype: Dtype) -> KVCache:
        """Return a cache of zeros, with capacity for `length` positions."""
        shape = (batch, num_heads, length, width // num_heads)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def update(self, new: KVCache, position: Int[Array, " b"]) -> KVCache:
        """Return the cache with one new entry per row, at the position of that row.

        An entry at a position beyond the capacity is dropped.
        """
        # With vmap, each device updates its rows; indexing all rows at once would gather them.
        store = jax.vmap(lambda old, index, x: old.at[:, index].set(x[:, 0], mode="drop"))
        return KVCache(*(store(old, position, x) for old, x in zip(self, new, strict=True)))


class Attention(nn.Module):
    """Multi-head attention with the projections `q`, `k`, `v` and `out`.

    Queries are computed from `x`; keys and values from `context`, whose width may differ, or from
    `x` if there is no context. `use_bias=False` omits the biases of the projections. `causal` and
    `hand_written_gradients` are as in `layers.attention`.
    Raises UserError if the width of `x` is not divisible by `num_heads`.
    """

    num_heads: int
    causal: bool = False
    dtype: Dtype = jnp.float32
    kernel_init: initializers.Initializer = initializers.XAVIER_NORMAL
    hand_written_gradients: bool = True
    use_bias: bool = True

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
        """Return the output, and the keys and values that the queries attended to.

        `kv_cache` provides keys and values that were computed earlier, those of a context or of
        past positions. With `position`, `x` has one entry per row. Its key and value are stored in
        the cache at `position`, and its query attends to the positions up to that one.
        """
        width = x.shape[-1]
        if width % self.num_heads:
            raise UserError(
                f"width {width} is not divisible by num_heads={self.num_heads}; "
                "set num_heads to a divisor of the width"
            )

        def project(name: str, y: Array) -> Array:
            return self._split_heads(self._projection(width, name)(y))

        q, causal = project("q", x), self.causal
        if kv_cache is None:
            source = x if context is None else context
            kv_cache = KVCache(project("k", source), project("v", source))
        else:
            causal = False
            if position is not None:
                kv_cache = kv_cache.update(KVCache(project("k", x), project("v", x)), position)
                mask = jnp.arange(kv_cache.k.shape[2])[None] <= position[:, None]
        attend = functools.partial(attention, hand_written_gradients=self.hand_written_gradients)
        y = attend(q, *kv_cache, mask=mask, causal=causal)
        return self._projection(width, "out")(y.swapaxes(1, 2).reshape(x.shape)), kv_cache

    def project_kv(self, context: Float[Array, "b lk dc"]) -> KVCache:
        """Return the keys and values of a context, to pass to `attend` as `kv_cache`."""

        def project(name: str) -> Array:
            params = self.variables["params"][name]
            y = dense(
                context,
                params["kernel"],
                params.get("bias"),
                dtype=self.dtype,
                hand_written_gradients=self.hand_written_gradients,
            )
            return self._split_heads(y)

        return KVCache(project("k"), project("v"))

    def _projection(self, width: int, name: str) -> Dense:
        return Dense(
            width,
            self.use_bias,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            hand_written_gradients=self.hand_written_gradients,
            name=name,
        )

    def _split_heads(self, y: Float[Array, "b l d"]) -> Float[Array, "b k l c"]:
        shape = (*y.shape[:-1], self.num_heads, y.shape[-1] // self.num_heads)
        return y.astype(self.dtype).reshape(shape).swapaxes(1, 2)
