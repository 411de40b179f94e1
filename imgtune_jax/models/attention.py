"""Multi-head attention with its projections, and the cache of keys and values for decoding."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.models import initializers
from imgtune_jax.models.layers import Dense, Dtype, attention, dense


class KVCache(NamedTuple):
    """Keys and values of k heads at l positions, retained from one decoding step to the next."""

    k: Float[Array, "b k l d"]
    v: Float[Array, "b k l d"]

    @classmethod
    def init(cls, batch: int, length: int, *, num_heads: int, width: int, dtype: Dtype) -> KVCache:
        """Return a cache of zeros, with capacity for `length` positions."""
        shape = (batch, num_heads, length, width // num_heads)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def update(self, new: KVCache, position: Int[Array, " b"]) -> KVCache:
        """Store each row's one new entry at its position; drop one beyond the capacity."""
        # Row by row: indices over all rows would make every device gather the others' rows.
        store = jax.vmap(lambda old, at, x: old.at[:, at].set(x[:, 0], mode="drop"))
        return KVCache(*(store(old, position, x) for old, x in zip(self, new, strict=True)))


class Attention(nn.Module):
    """Multi-head attention with projections q, k, v and out, kernels [d d].

    Attends from `x` to itself, or to `context`, whose width may differ. `causal` as in
    `layers.attention`. Raises ValueError if `num_heads` does not divide the width.
    """

    num_heads: int
    causal: bool = False
    dtype: Dtype = jnp.float32
    kernel_init: initializers.Initializer = initializers.XAVIER_NORMAL
    hand_written_gradients: bool = True

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
        """Return the output, and the keys and values that it was computed from.

        `kv_cache` holds keys and values computed before, instead of those of a context. With
        `position`, x has one entry per row, which is stored in the cache at that position, and
        attends to the positions up to it.
        """
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(
                f"width {width} does not divide over {self.num_heads} heads; "
                "set num_heads to a divisor of the width"
            )

        def heads(name: str, y: Array) -> Array:
            return self._split_heads(self._projection(width, name)(y))

        q, causal = heads("q", x), self.causal
        if kv_cache is None:
            source = x if context is None else context
            kv_cache = KVCache(heads("k", source), heads("v", source))
        else:
            causal = False
            if position is not None:
                kv_cache = kv_cache.update(KVCache(heads("k", x), heads("v", x)), position)
                mask = jnp.arange(kv_cache.k.shape[2])[None] <= position[:, None]
        attend = functools.partial(attention, hand_written_gradients=self.hand_written_gradients)
        y = attend(q, *kv_cache, mask=mask, causal=causal)
        return self._projection(width, "out")(y.swapaxes(1, 2).reshape(x.shape)), kv_cache

    def project_kv(self, context: Float[Array, "b lk dc"]) -> KVCache:
        """Return the keys and values of a context, to pass to `attend` as `kv_cache`."""

        def project(name: str) -> Array:
            p = self.variables["params"][name]
            manual = self.hand_written_gradients
            y = dense(
                context, p["kernel"], p["bias"], dtype=self.dtype, hand_written_gradients=manual
            )
            return self._split_heads(y)

        return KVCache(project("k"), project("v"))

    def _projection(self, width: int, name: str) -> Dense:
        return Dense(
            width,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            hand_written_gradients=self.hand_written_gradients,
            name=name,
        )

    def _split_heads(self, y: Float[Array, "b l d"]) -> Float[Array, "b k l c"]:
        shape = (*y.shape[:-1], self.num_heads, y.shape[-1] // self.num_heads)
        return y.astype(self.dtype).reshape(shape).swapaxes(1, 2)
