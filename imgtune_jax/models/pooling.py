"""From a sequence of tokens to one vector."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.models import initializers, layers
from imgtune_jax.models.block import MlpBlock


class TowerOutput(NamedTuple):
    """What any tower gives: one vector an example, and the tokens that it was pooled from."""

    pooled: Float[Array, "b d"]
    tokens: Float[Array, "b l e"]


def masked_mean(x: Float[Array, "b l d"], mask: Bool[Array, "b l"]) -> Float[Array, "b d"]:
    """Mean over the positions where `mask` holds; zeros for a row that has none."""
    weight = mask[..., None].astype(x.dtype)
    return (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)


def last_true_index(mask: Bool[Array, "b l"]) -> Int[Array, " b"]:
    """Index of each row's last True (EOT when the text ends with it); 0 for a row without one."""
    return jnp.max(jnp.where(mask, jnp.arange(mask.shape[1])[None], 0), axis=1)


class MAPHead(nn.Module):
    """MAP head: one learned query over all tokens, then a residual MLP (big_vision, SigLIP)."""

    num_heads: int
    mlp_dim: int
    act: str = "gelu_tanh"
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None, *, train: bool
    ) -> Float[Array, "b d"]:
        probe = self.param("probe", initializers.XAVIER_NORMAL, (1, 1, x.shape[-1]), jnp.float32)
        query = jnp.broadcast_to(probe, (x.shape[0], 1, x.shape[-1]))
        attn = layers.Attention(self.num_heads, dtype=self.dtype, name="attn")
        y = attn(query, x, mask=mask)
        mlp = MlpBlock(self.mlp_dim, self.act, self.dropout, self.dtype, name="mlp")
        y = y + mlp(layers.LayerNorm(self.norm_epsilon, name="norm")(y), train=train)
        return y[:, 0]
