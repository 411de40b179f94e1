"""One transformer layer: self-attention, cross-attention where there is a context, MLP."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, cast

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.models import initializers, layers
from imgtune_jax.models.layers import Attention, KVCache, LayerNorm

Cross = Literal["none", "layer", "block"]


class MlpBlock(nn.Module):
    """fc2(act(fc1(x))), back to the width of x; dropout after the activation."""

    mlp_dim: int
    act: str = "gelu"
    dropout: float = 0.0
    dtype: layers.Dtype = jnp.float32
    kernel_init: initializers.Initializer = initializers.XAVIER_NORMAL

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"], *, train: bool) -> Float[Array, "*n d"]:
        linear = functools.partial(
            layers.Dense, dtype=self.dtype, kernel_init=self.kernel_init, parent=self
        )
        y = layers.activation(self.act)(linear(self.mlp_dim, name="fc1")(x))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return linear(x.shape[-1], name="fc2")(y)


class LayerCache(NamedTuple):
    """What one layer keeps between decoding steps."""

    self_attention: KVCache
    cross: KVCache | None


class Block(nn.Module):
    """One transformer layer: attention and MLP, each with a residual and a norm.

    `post_norm=False` normalises a branch's input (ViT, CLIP); True normalises the sum (BERT).
    Dropout is applied to the branches' outputs and inside the MLP. `cross` is how a context [b m e]
    is read:
      none   not at all.
      layer  between self-attention and the MLP (1706.03762, CapPa).
      block  by a block of its own behind that of self-attention, with its own MLP, and a norm on
             the context: open_clip's multimodal decoder.
    """

    num_heads: int
    mlp_dim: int
    causal: bool = False
    post_norm: bool = False
    act: str = "gelu"
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: layers.Dtype = jnp.float32
    kernel_init: initializers.Initializer = initializers.XAVIER_NORMAL
    cross: Cross = "none"

    def __call__(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "b l"] | Bool[Array, "b l l"] | None = None,
        context: Float[Array, "b m e"] | None = None,
        *,
        train: bool,
    ) -> Float[Array, "b l d"]:
        return self._run(x, mask, context, train=train)[0]

    def decode_step(
        self, x: Float[Array, "b 1 d"], cache: LayerCache, position: Int[Array, " b"]
    ) -> tuple[Float[Array, "b 1 d"], LayerCache]:
        """One position of each row, given what `cache` holds of those before it."""
        return self._run(x, None, None, cache, position, train=False)

    def project_context(self, context: Float[Array, "b m e"]) -> KVCache:
        """What cross-attention reads of a context, computed once for all steps."""
        own = self.variables["params"]
        if self.cross == "block":
            norm = LayerNorm(self.norm_epsilon, parent=None)
            context = cast(Array, norm.apply({"params": own["cross_context_norm"]}, context))
        attend: Any = Attention(self.num_heads, dtype=self.dtype, parent=None)
        return attend.apply({"params": own["cross"]}, context, method="project_kv")

    @nn.compact
    def _run(
        self,
        x: Array,
        mask: Array | None,
        context: Array | None,
        cache: LayerCache | None = None,
        position: Array | None = None,
        *,
        train: bool,
    ) -> tuple[Array, LayerCache]:
        norm = functools.partial(LayerNorm, self.norm_epsilon, parent=self)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        common: dict[str, Any] = dict(dtype=self.dtype, kernel_init=self.kernel_init)
        fields = (self.mlp_dim, self.act, self.dropout)
        attn = Attention(self.num_heads, self.causal, name="attn", **common)
        mlp = MlpBlock(*fields, name="mlp", **common)
        norm1, norm2 = norm(name="norm1"), norm(name="norm2")
        known = None if cache is None else cache.self_attention
        if self.post_norm:
            y, own = attn.attend(x, mask=mask, kv_cache=known, position=position)
            x = norm1(x + drop(y))
            return norm2(x + drop(mlp(x, train=train))), LayerCache(own, None)
        y, own = attn.attend(norm1(x), mask=mask, kv_cache=known, position=position)
        x, read = x + drop(y), None
        if self.cross == "block":
            x = x + drop(mlp(norm2(x), train=train))
            mlp, norm2 = MlpBlock(*fields, name="cross_mlp", **common), norm(name="cross_norm2")
            context = None if context is None else norm(name="cross_context_norm")(context)
        if self.cross != "none":
            cross = Attention(self.num_heads, name="cross", **common)
            read = None if cache is None else cache.cross
            y, read = cross.attend(norm(name="cross_norm")(x), context, kv_cache=read)
            x = x + drop(y)
        return x + drop(mlp(norm2(x), train=train)), LayerCache(own, read)
