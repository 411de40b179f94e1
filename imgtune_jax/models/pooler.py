"""Attentional poolers between an image tower and its readers (CoCa, 2205.01917, section 3.2)."""

from __future__ import annotations

import functools
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from imgtune_jax.models import initializers, layers
from imgtune_jax.models.pooling import TowerOutput


class QueryAttention(nn.Module):
    """Learned queries that attend to all tokens: one attention, no residual and no MLP."""

    num_queries: int
    width: int
    num_heads: int
    norm_epsilon: float
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b m e"]) -> Float[Array, "b n d"]:
        norm = functools.partial(layers.LayerNorm, self.norm_epsilon, parent=self)
        shape = (self.num_queries, self.width)
        query = norm(name="query_norm")(
            self.param("query", initializers.normal(1.0), shape, jnp.float32)
        )
        query = jnp.broadcast_to(query, (len(x), *shape))
        attn = layers.Attention(self.num_heads, dtype=self.dtype, name="attn")
        return attn(query, norm(name="context_norm")(x))


class AttentionalPooler(nn.Module):
    """Image tokens to a vector for matching and `num_queries` tokens for writing.

    `layout` is one of
      cascade   the vector is one query over the tokens for writing: the paper's.
      parallel  the vector is one query over the image's own tokens.
      shared    one set of queries and a norm behind it: the first is the vector, the other
                num_queries - 1 the tokens. What open_clip's CoCa models are made of.
    """

    width: int
    num_queries: int = 256
    num_heads: int = 8
    layout: Literal["cascade", "parallel", "shared"] = "cascade"
    norm_epsilon: float = 1e-6
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b m e"], *, train: bool) -> TowerOutput:
        del train  # no dropout
        if self.layout not in ("cascade", "parallel", "shared"):
            raise ValueError(
                f"attentional pooler layout={self.layout!r}; want cascade, parallel or shared"
            )
        fields = (self.width, self.num_heads, self.norm_epsilon, self.dtype)
        tokens = QueryAttention(self.num_queries, *fields, name="captioning")(x)
        if self.layout == "shared":
            tokens = layers.LayerNorm(self.norm_epsilon, name="norm")(tokens)
            return TowerOutput(tokens[:, 0], tokens[:, 1:])
        source = tokens if self.layout == "cascade" else x
        return TowerOutput(QueryAttention(1, *fields, name="contrastive")(source)[:, 0], tokens)
