"""One transformer layer: self-attention, cross-attention if there is a context, MLP.

Axis letters: m context tokens of width e, *n any leading axes.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.models import initializers, layers
from imgtune_jax.models.attention import Attention, KVCache

Cross = Literal["none", "layer", "block"]


class MlpBlock(nn.Module):
    """fc2(dropout(act(fc1(x)))), without biases if not `use_bias`. The output has x's width."""

    mlp_dim: int
    act: str = "gelu"
    dropout: float = 0.0
    dtype: layers.Dtype = jnp.float32
    kernel_init: initializers.Initializer = initializers.XAVIER_NORMAL
    hand_written_gradients: bool = True
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"], *, train: bool = False) -> Float[Array, "*n d"]:
        def linear(features: int, name: str) -> layers.Dense:
            return layers.Dense(
                features,
                self.use_bias,
                dtype=self.dtype,
                kernel_init=self.kernel_init,
                hand_written_gradients=self.hand_written_gradients,
                name=name,
            )

        y = layers.activation(self.act)(linear(self.mlp_dim, "fc1")(x))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return linear(x.shape[-1], "fc2")(y)


class LayerCache(NamedTuple):
    """Keys and values of a layer's self- and cross-attention, retained between decoding steps."""

    self_attention: KVCache
    cross: KVCache | None


class Block(nn.Module):
    """One transformer layer: attention and MLP, each with a residual and a norm.

    `post_norm=False` normalizes the inputs of attention and MLP (ViT, CLIP); True normalizes each
    sum with the residual (BERT). Dropout applies to the outputs of attention and MLP, and inside
    the MLP. `use_bias=False` omits all biases, those of norms included. `hand_written_gradients` is
    as in `layers`. `cross` is the position of cross-attention to a context [b m e]:
      none   there is no cross-attention.
      layer  between self-attention and the MLP (1706.03762, CapPa).
      block  after the MLP, followed by a second MLP, with a norm on the context (open_clip's
             multimodal decoder).
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
    hand_written_gradients: bool = True
    use_bias: bool = True

    def __call__(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "b l"] | Bool[Array, "b l l"] | None = None,
        context: Float[Array, "b m e"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b l d"]:
        return self._run(x, mask, context, train=train)[0]

    def decode_step(
        self, x: Float[Array, "b 1 d"], cache: LayerCache, position: Int[Array, " b"]
    ) -> tuple[Float[Array, "b 1 d"], LayerCache]:
        """Run one position per row, given the cache of the positions before it."""
        return self._run(x, None, None, cache, position, train=False)

    def project_context(self, context: Float[Array, "b m e"]) -> KVCache:
        """Return the keys and values of a context, which are the same in all decoding steps."""
        params = self.variables["params"]
        if self.cross == "block":
            norm = self._norm(None, parent=None)
            context = cast(Array, norm.apply({"params": params["cross_context_norm"]}, context))
        attend: Any = Attention(self.num_heads, dtype=self.dtype, parent=None)
        return attend.apply({"params": params["cross"]}, context, method="project_kv")

    def _norm(self, name: str | None, **options: Any) -> layers.LayerNorm:
        return layers.LayerNorm(
            self.norm_epsilon, self.hand_written_gradients, self.use_bias, name=name, **options
        )

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
        norm, drop = self._norm, nn.Dropout(self.dropout, deterministic=not train)
        common: dict[str, Any] = dict(
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            hand_written_gradients=self.hand_written_gradients,
            use_bias=self.use_bias,
        )
        fields = (self.mlp_dim, self.act, self.dropout)
        attn = Attention(self.num_heads, self.causal, name="attn", **common)
        mlp = MlpBlock(*fields, name="mlp", **common)
        norm1, norm2 = norm("norm1"), norm("norm2")
        past = None if cache is None else cache.self_attention
        if self.post_norm:
            y, kv = attn.attend(x, mask=mask, kv_cache=past, position=position)
            x = norm1(x + drop(y))
            return norm2(x + drop(mlp(x, train=train))), LayerCache(kv, None)
        y, kv = attn.attend(norm1(x), mask=mask, kv_cache=past, position=position)
        x, cross_kv = x + drop(y), None
        if self.cross == "block":
            x = x + drop(mlp(norm2(x), train=train))
            mlp, norm2 = MlpBlock(*fields, name="cross_mlp", **common), norm("cross_norm2")
            context = None if context is None else norm("cross_context_norm")(context)
        if self.cross != "none":
            cross = Attention(self.num_heads, name="cross", **common)
            cross_kv = None if cache is None else cache.cross
            y, cross_kv = cross.attend(norm("cross_norm")(x), context, kv_cache=cross_kv)
            x = x + drop(y)
        return x + drop(mlp(norm2(x), train=train)), LayerCache(kv, cross_kv)
