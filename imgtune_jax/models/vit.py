"""Vision Transformer (2010.11929), with the options that CLIP, SigLIP and DINO weights need."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from imgtune_jax.models import initializers, layers, pooling, positions, sizes
from imgtune_jax.models.layer_stack import Part
from imgtune_jax.models.transformer import Transformer

POOLS = ("cls", "mean", "mean_all", "attention")


class ViT(Transformer):
    """Normalised square images to a vector; tokens are [cls, registers, patches].

    `pool` is "cls", "mean" (patches only), "mean_all" (class token and registers too) or
    "attention" (one learned query and an MLP: SigLIP's MAP head). `final_norm` says where the last
    LayerNorm stands. Three pairs are in use under the one name "GAP", and weights of one give
    nonsense under another (open_clip#579):
      big_vision   pool="mean",     final_norm="before_pool", class_token=False
      timm, MAE    pool="mean",     final_norm="after_pool"
      old open_clip pool="mean_all", final_norm="before_pool"

    `positions` "learned" holds `pos_embed` for patches only; the class token, if any, has its own
    position inside its own vector. `pre_norm` is CLIP's ln_pre, with `patch_bias=False`.
    `patch_dropout` leaves out that share of the patches in training (2212.00794).

    From scratch: Xavier normal matrices, LeCun normal patches, positions normal(1/sqrt(width)),
    class token zero. Where patches do not fill the image (So400m/14 at 384), the pixels beyond the
    last whole patch are not looked at, as with an unpadded convolution. Raises ValueError on an
    image that is not `image_size`².
    """

    width: int = 768
    depth: int = 12
    mlp_dim: int = 3072
    num_heads: int = 12
    patch_size: int = 16
    image_size: int = 224
    pool: Literal["cls", "mean", "mean_all", "attention"] = "cls"
    class_token: bool = True
    num_registers: int = 0
    positions: Literal["learned", "sincos"] = "learned"
    pre_norm: bool = False
    patch_bias: bool = True
    final_norm: Literal["before_pool", "after_pool", "none"] = "before_pool"
    act: str = "gelu_tanh"
    norm_epsilon: float = 1e-6
    patch_dropout: float = 0.0

    @classmethod
    def variant_fields(cls, variant: str) -> dict[str, Any]:
        """The sizes behind "Ti/16", "So400m/14", …"""
        return sizes.decode_vit_variant(variant)

    @nn.compact
    def __call__(
        self, image: Float[Array, "b h w c"], *, train: bool, part: Part = "whole"
    ) -> pooling.TowerOutput | Array:
        x = image
        if part != "rest":
            self._check(image)
            x = self._embed(image, train=train and self.num_frozen_layers == 0)
        x = self.run_blocks(x, train=train, part=part)
        if part == "front":
            return x
        return self._pool(x, train=train and self.num_frozen_layers != -1)

    def _check(self, image: Float[Array, "b h w c"]) -> None:
        if image.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"image of {image.shape[1]}×{image.shape[2]} pixels, but vit has "
                f"image_size={self.image_size}; resize the data or set image_size"
            )
        if self.image_size < self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is smaller than patch_size={self.patch_size}"
            )
        if self.pool == "cls" and not self.class_token:
            raise ValueError("pool='cls' needs class_token=True")
        if self.pool not in POOLS or self.final_norm not in ("before_pool", "after_pool", "none"):
            raise ValueError(
                f"vit pool={self.pool!r}, final_norm={self.final_norm!r}; want pool in {POOLS} "
                "and final_norm in ('before_pool', 'after_pool', 'none')"
            )

    def _embed(self, image: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b l d"]:
        x = self._patches(image)
        if self.positions == "learned":
            law = initializers.normal(self.width**-0.5)
            x = x + self.param("pos_embed", law, x.shape[1:], jnp.float32)[None]
        elif self.positions == "sincos":
            x = x + positions.sincos_2d(self.image_size // self.patch_size, self.width)[None]
        else:
            raise ValueError(f"vit positions={self.positions!r}; want 'learned' or 'sincos'")
        if train and self.patch_dropout:
            x = drop_patches(x, self.make_rng("dropout"), rate=self.patch_dropout)
        x = jnp.concatenate([*self._special_tokens(len(x)), x], axis=1)
        if self.pre_norm:
            x = layers.LayerNorm(self.norm_epsilon, name="pre_norm")(x)
        return nn.Dropout(self.dropout, deterministic=not train)(x)

    def _patches(self, image: Float[Array, "b h w c"]) -> Float[Array, "b l d"]:
        b, size, _, channels = image.shape
        p, grid = self.patch_size, size // self.patch_size
        image = image[:, : grid * p, : grid * p]
        x = image.reshape(b, grid, p, grid, p, channels).swapaxes(2, 3)
        return PatchEmbed(self.width, p, self.patch_bias, self.dtype, name="patch_embed")(
            x.reshape(b, grid * grid, p * p * channels)
        )

    def _special_tokens(self, b: int) -> list[Float[Array, "b n d"]]:
        tokens = []
        if self.class_token:
            tokens.append(
                self.param("class_token", initializers.ZEROS, (1, self.width), jnp.float32)
            )
        if self.num_registers:
            law, shape = initializers.normal(0.02), (self.num_registers, self.width)
            tokens.append(self.param("registers", law, shape, jnp.float32))
        return [jnp.broadcast_to(t, (b, *t.shape)) for t in tokens]

    def _pool(self, x: Float[Array, "b l d"], *, train: bool) -> pooling.TowerOutput:
        def norm(y: Array) -> Array:
            return layers.LayerNorm(self.norm_epsilon, name="final_norm")(y)

        if self.final_norm == "before_pool":
            x = norm(x)
        if self.pool == "cls":
            pooled = x[:, 0]
        elif self.pool == "attention":
            pooled = self.attention_pool(x, train=train)
        else:
            skip = self.class_token + self.num_registers if self.pool == "mean" else 0
            pooled = x[:, skip:].mean(1)
        pooled = norm(pooled) if self.final_norm == "after_pool" else pooled
        return pooling.TowerOutput(pooled, x)


class PatchEmbed(nn.Module):
    """The patch convolution as one product over flattened [p p c] patches; kernel [p p c d]."""

    width: int
    patch_size: int
    use_bias: bool
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, patches: Float[Array, "b l i"]) -> Float[Array, "b l d"]:
        p = self.patch_size
        shape = (p, p, patches.shape[-1] // (p * p), self.width)
        kernel = self.param("kernel", initializers.LECUN_NORMAL, shape, jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", initializers.ZEROS, (self.width,), jnp.float32)
        return layers.dense(patches, kernel.reshape(-1, self.width), bias, dtype=self.dtype)


def drop_patches(x: Float[Array, "b l d"], key: jax.Array, *, rate: float) -> Float[Array, "b m d"]:
    """A random subset of each example's patches, in order; at least one is kept (2212.00794)."""
    b, length, _ = x.shape
    keep = max(1, round(length * (1 - rate)))
    order = jnp.argsort(jax.random.uniform(key, (b, length)), axis=1)[:, :keep]
    return jnp.take_along_axis(x, jnp.sort(order, axis=1)[..., None], axis=1)
