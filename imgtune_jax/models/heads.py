"""From a tower's pooled vector to the shared embedding space."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from imgtune_jax.models import initializers, layers


def standardize(module: nn.Module, x: Float[Array, "b i"]) -> Float[Array, "b i"]:
    """(x - input_mean) / input_std, dimension by dimension.

    The two are statistics, not weights: measured once on training data, then always locked. A
    locked tower's dimensions differ in scale by orders of magnitude; without this a linear map on
    top learns the small ones last.
    """
    width = (x.shape[-1],)
    mean = module.param("input_mean", initializers.ZEROS, width, jnp.float32)
    std = module.param("input_std", initializers.ONES, width, jnp.float32)
    x = x.astype(jnp.float32)
    return (x - layers.expand_like(mean, x)) / layers.expand_like(std, x)


class IdentityHead(nn.Module):
    """The pooled vector itself: for a tower whose space is the shared one. No weights.

    Raises ValueError if the tower's width is not `embed_dim`.
    """

    embed_dim: int
    standardize: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b i"], *, train: bool) -> Float[Array, "b d"]:
        del train
        if x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"identity head: the tower gives {x.shape[-1]} features, embed_dim is "
                f"{self.embed_dim}; set embed_dim={x.shape[-1]} or use a linear head"
            )
        return standardize(self, x) if self.standardize else x.astype(jnp.float32)


class LinearHead(nn.Module):
    """One affine map, CLIP's and LiT's projection (`use_bias=False` for CLIP).

    `standardize` puts fixed statistics in front; see `standardized`.
    """

    embed_dim: int
    use_bias: bool = False
    standardize: bool = False
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b i"], *, train: bool) -> Float[Array, "b d"]:
        del train
        if self.standardize:
            x = standardize(self, x)
        # std 1/sqrt(i), as CLIP draws its projections
        kernel = self.param(
            "kernel", initializers.LECUN_NORMAL, (x.shape[-1], self.embed_dim), jnp.float32
        )
        bias = None
        if self.use_bias:
            bias = self.param("bias", initializers.ZEROS, (self.embed_dim,), jnp.float32)
        return layers.dense(x, kernel, bias, dtype=self.dtype)


class MlpHead(nn.Module):
    """norm? → fc1 → activation → dropout → fc2.

    `input_norm` adds a LayerNorm in front, `standardize` fixed statistics; see `standardized`.
    """

    embed_dim: int
    hidden_dim: int = 1024
    act: str = "gelu"
    input_norm: bool = False
    standardize: bool = False
    use_bias: bool = True
    dropout: float = 0.0
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b i"], *, train: bool) -> Float[Array, "b d"]:
        if self.standardize:
            x = standardize(self, x)
        if self.input_norm:
            x = layers.LayerNorm(name="norm1")(x)
        x = layers.Dense(self.hidden_dim, self.use_bias, dtype=self.dtype, name="fc1")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(layers.activation(self.act)(x))
        return layers.Dense(self.embed_dim, self.use_bias, dtype=self.dtype, name="fc2")(x)
