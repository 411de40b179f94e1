"""Heads, which map a tower's pooled vector to the shared embedding space.

Axis letters: i width of the pooled vector, d = `embed_dim`.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from imgtune_jax.errors import UserError
from imgtune_jax.models import initializers, layers


def standardize(module: nn.Module, x: Float[Array, "b i"]) -> Float[Array, "b i"]:
    """Return (x - input_mean) / input_std per dimension. Both are parameters of `module`.

    They are statistics, not weights: they are measured on training data and then stay frozen. The
    dimensions of a locked tower's features differ in scale by orders of magnitude. Without
    standardization, a linear map learns the small ones last.
    """
    width = (x.shape[-1],)
    mean = initializers.param(module, "input_mean", initializers.ZEROS, width)
    std = initializers.param(module, "input_std", initializers.ONES, width)
    x = x.astype(jnp.float32)
    return (x - layers.expand_like(mean, x)) / layers.expand_like(std, x)


class IdentityHead(nn.Module):
    """Head without weights, for a tower whose pooled vector already is an embedding.

    `standardize` applies the function `standardize`. Raises UserError if the tower's width is not
    `embed_dim`.
    """

    embed_dim: int
    standardize: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b i"], *, train: bool = False) -> Float[Array, "b d"]:
        del train
        if x.shape[-1] != self.embed_dim:
            raise UserError(
                f"identity head: the tower returns {x.shape[-1]} features, embed_dim is "
                f"{self.embed_dim}; set embed_dim={x.shape[-1]} or use a linear head"
            )
        return standardize(self, x) if self.standardize else x.astype(jnp.float32)


class LinearHead(nn.Module):
    """One affine map, as in LiT and CLIP (CLIP's has no bias).

    `standardize` applies the function `standardize` first.
    """

    embed_dim: int
    use_bias: bool = False
    standardize: bool = False
    dtype: layers.Dtype = jnp.float32
    hand_written_gradients: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b i"], *, train: bool = False) -> Float[Array, "b d"]:
        del train
        if self.standardize:
            x = standardize(self, x)
        # standard deviation 1/sqrt(i), as in CLIP's projections
        shape = (x.shape[-1], self.embed_dim)
        kernel = initializers.param(self, "kernel", initializers.LECUN_NORMAL, shape)
        bias = None
        if self.use_bias:
            bias = initializers.param(self, "bias", initializers.ZEROS, (self.embed_dim,))
        manual = self.hand_written_gradients
        return layers.dense(x, kernel, bias, dtype=self.dtype, hand_written_gradients=manual)


class MlpHead(nn.Module):
    """MLP with one hidden layer: fc1, activation, dropout, fc2.

    `standardize` applies the function `standardize` first. `input_norm` then applies a LayerNorm.
    """

    embed_dim: int
    hidden_dim: int = 1024
    act: str = "gelu"
    input_norm: bool = False
    standardize: bool = False
    use_bias: bool = True
    dropout: float = 0.0
    dtype: layers.Dtype = jnp.float32
    hand_written_gradients: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b i"], *, train: bool = False) -> Float[Array, "b d"]:
        manual = self.hand_written_gradients

        def linear(features: int, name: str) -> layers.Dense:
            return layers.Dense(
                features, self.use_bias, self.dtype, hand_written_gradients=manual, name=name
            )

        if self.standardize:
            x = standardize(self, x)
        if self.input_norm:
            x = layers.LayerNorm(hand_written_gradients=manual, name="norm1")(x)
        x = linear(self.hidden_dim, "fc1")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(layers.activation(self.act)(x))
        return linear(self.embed_dim, "fc2")(x)
