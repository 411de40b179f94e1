"""Poolers, which reduce a sequence of tokens to one vector, or to one vector and fewer tokens.

Axis letters: m image tokens, e width of the input tokens, n queries.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.errors import UserError
from imgtune_jax.models import initializers, layers
from imgtune_jax.models.attention import Attention
from imgtune_jax.models.block import MlpBlock

# Values of `pool` of the text towers that read the output of one token, and that token, which the
# tokenizer must add to every text. Without it, an empty text would be pooled at its padding.
POOLED_TOKENS = {"eot": "end", "first": "begin", "cls": "begin"}


class TowerOutput(NamedTuple):
    """The output of a tower: one vector per example, and a sequence of tokens of width e."""

    pooled: Float[Array, "b d"]
    tokens: Float[Array, "b l e"]


def masked_mean(x: Float[Array, "b l d"], mask: Bool[Array, "b l"]) -> Float[Array, "b d"]:
    """Return the mean over the positions where `mask` is True; zeros for a row without any."""
    weight = mask[..., None].astype(x.dtype)
    return (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)


def last_true_index(mask: Bool[Array, "b l"]) -> Int[Array, " b"]:
    """Return the index of the last True of each row, in CLIP the end-of-text token; 0 if none."""
    return jnp.max(jnp.where(mask, jnp.arange(mask.shape[1])[None], 0), axis=1)


class MAPHead(nn.Module):
    """Multi-head attention pooling (MAP): attention of one learned query, then a residual MLP.

    As in big_vision and SigLIP.
    """

    num_heads: int
    mlp_dim: int
    act: str = "gelu_tanh"
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: layers.Dtype = jnp.float32
    hand_written_gradients: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "b l"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b d"]:
        manual = self.hand_written_gradients
        shape = (1, 1, x.shape[-1])
        probe = initializers.param(self, "probe", initializers.XAVIER_NORMAL, shape)
        query = jnp.broadcast_to(probe, (x.shape[0], 1, x.shape[-1]))
        attn = Attention(
            self.num_heads, dtype=self.dtype, hand_written_gradients=manual, name="attn"
        )
        y = attn(query, x, mask=mask)
        mlp = MlpBlock(
            self.mlp_dim,
            self.act,
            self.dropout,
            self.dtype,
            hand_written_gradients=manual,
            name="mlp",
        )
        norm = layers.LayerNorm(self.norm_epsilon, manual, name="norm")
        y = y + mlp(norm(y), train=train)
        return y[:, 0]


class QueryAttention(nn.Module):
    """Attention of learned queries to all tokens, without a residual and without an MLP."""

    num_queries: int
    width: int
    num_heads: int
    norm_epsilon: float
    dtype: layers.Dtype
    hand_written_gradients: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b m e"]) -> Float[Array, "b n d"]:
        manual = self.hand_written_gradients

        def norm(name: str) -> layers.LayerNorm:
            return layers.LayerNorm(self.norm_epsilon, manual, name=name)

        shape = (self.num_queries, self.width)
        query = initializers.param(self, "query", initializers.Normal(1.0), shape)
        query = jnp.broadcast_to(norm("query_norm")(query), (len(x), *shape))
        attn = Attention(
            self.num_heads, dtype=self.dtype, hand_written_gradients=manual, name="attn"
        )
        return attn(query, norm("context_norm")(x))


class AttentionalPooler(nn.Module):
    """Pools image tokens to a contrastive vector and `num_queries` captioning tokens.

    From CoCa (2205.01917, section 3.2). `layout` is one of
      cascade   the query of the vector attends to the captioning tokens, as in the paper.
      parallel  the query of the vector attends to the tower's tokens.
      shared    the outputs of one set of `num_queries` queries are normalized. The first is the
                vector; the others are the captioning tokens. open_clip's CoCa models use it.
    """

    width: int
    num_queries: int = 256
    num_heads: int = 8
    layout: Literal["cascade", "parallel", "shared"] = "cascade"
    norm_epsilon: float = 1e-6
    dtype: layers.Dtype = jnp.float32
    hand_written_gradients: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b m e"], *, train: bool = False) -> TowerOutput:
        del train  # no dropout
        if self.layout not in ("cascade", "parallel", "shared"):
            raise UserError(
                f"attentional pooler layout = {self.layout!r}; "
                "expected 'cascade', 'parallel' or 'shared'"
            )
        manual = self.hand_written_gradients
        fields = (self.width, self.num_heads, self.norm_epsilon, self.dtype, manual)
        tokens = QueryAttention(self.num_queries, *fields, name="captioning")(x)
        if self.layout == "shared":
            tokens = layers.LayerNorm(self.norm_epsilon, manual, name="norm")(tokens)
            return TowerOutput(tokens[:, 0], tokens[:, 1:])
        source = tokens if self.layout == "cascade" else x
        return TowerOutput(QueryAttention(1, *fields, name="contrastive")(source)[:, 0], tokens)
