"""Vision Transformer (2010.11929), with the options that CLIP, SigLIP and DINO weights need.

Axis letters: p patch size, i = p·p·c values of a patch, n special tokens, m retained patches.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from imgtune_jax.errors import UserError
from imgtune_jax.models import initializers, layers, positions, sizes
from imgtune_jax.models.layer_stack import Segment
from imgtune_jax.models.pooling import TowerOutput
from imgtune_jax.models.transformer import TransformerTower

POOLS = ("cls", "mean", "mean_all", "attention")


class ViT(TransformerTower):
    """Image tower for normalized square images. Its tokens are [class token, registers, patches].

    `pool` is "cls" (class token), "mean" (patches only), "mean_all" (class token and registers too)
    or "attention" (SigLIP's multi-head attention pooling, `MAPHead`). `final_norm` is the position
    of the last LayerNorm. Three combinations are called global average pooling (GAP). Weights that
    were trained with one produce meaningless output with another (open_clip#579):
      big_vision    pool="mean",     final_norm="before_pool", class_token=False
      timm, MAE     pool="mean",     final_norm="after_pool"
      old open_clip pool="mean_all", final_norm="before_pool"

    With `positions="learned"`, `pos_embed` has the position embeddings of the patches only; the
    parameter `class_token`, if any, includes its position embedding. CLIP has `pre_norm=True` (its
    ln_pre) and `patch_bias=False`. `patch_dropout` omits that fraction of the patches in training
    (2212.00794). If patches do not fill the image (So400m/14 at 384), the pixels after the last
    full patch are ignored, as by an unpadded convolution. Raises UserError if an image is not
    `image_size`×`image_size`.

    Initial values: matrices Xavier normal, patch embedding LeCun normal, positions with standard
    deviation 1/sqrt(width), class token zero. `hand_written_gradients=True` supports reverse mode
    only, as in Transformer.
    """

    CONFIG_NAME: ClassVar[str] = "vit"

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
        """Return the sizes of a variant such as "Ti/16" or "So400m/14"."""
        return sizes.decode_vit_variant(variant)

    def __call__(self, image: Float[Array, "b h w c"], *, train: bool = False) -> TowerOutput:
        return cast(TowerOutput, self._run(image, train=train))

    def run_prefix(self, image: Float[Array, "b h w c"]) -> Float[Array, "b l d"]:
        """Return the tokens after the frozen layers, in eval mode."""
        return cast(Array, self._run(image, segment=Segment.PREFIX))

    def run_suffix(self, tokens: Float[Array, "b l d"], *, train: bool = False) -> TowerOutput:
        """Return the tower's output, given the output of `run_prefix`."""
        return cast(TowerOutput, self._run(tokens, train=train, segment=Segment.SUFFIX))

    def _check(self, image: Float[Array, "b h w c"]) -> None:
        if image.shape[1:3] != (self.image_size, self.image_size):
            raise UserError(
                f"image of {image.shape[1]}×{image.shape[2]} pixels, but vit has "
                f"image_size={self.image_size}; resize the data or set image_size"
            )
        if self.image_size < self.patch_size:
            raise UserError(
                f"image_size={self.image_size} is smaller than patch_size={self.patch_size}; "
                "set a smaller patch_size"
            )
        if self.pool == "cls" and not self.class_token:
            raise UserError("pool='cls' needs a class token; set class_token=True or another pool")
        if self.pool not in POOLS or self.final_norm not in ("before_pool", "after_pool", "none"):
            raise UserError(
                f"vit pool = {self.pool!r}, final_norm = {self.final_norm!r}; expected pool in "
                f"{POOLS} and final_norm in ('before_pool', 'after_pool', 'none')"
            )

    def _embed(self, inputs: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b l d"]:
        self._check(inputs)
        x = self._patches(inputs)
        if self.positions == "learned":
            init = initializers.Normal(self.width**-0.5)
            x = x + initializers.param(self, "pos_embed", init, x.shape[1:])[None]
        elif self.positions == "sincos":
            x = x + positions.sincos_2d(self.image_size // self.patch_size, self.width)[None]
        else:
            raise UserError(f"vit positions = {self.positions!r}; expected 'learned' or 'sincos'")
        if train and self.patch_dropout:
            x = drop_patches(x, self.make_rng("dropout"), rate=self.patch_dropout)
        x = jnp.concatenate([*self._special_tokens(len(x)), x], axis=1)
        if self.pre_norm:
            x = self.norm("pre_norm")(x)
        return nn.Dropout(self.dropout, deterministic=not train)(x)

    def _patches(self, image: Float[Array, "b h w c"]) -> Float[Array, "b l d"]:
        b, size, _, channels = image.shape
        patch, grid = self.patch_size, size // self.patch_size
        image = image[:, : grid * patch, : grid * patch]
        x = image.reshape(b, grid, patch, grid, patch, channels).swapaxes(2, 3)
        embed = PatchEmbed(
            self.width,
            patch,
            self.patch_bias,
            self.dtype,
            self.hand_written_gradients,
            name="patch_embed",
        )
        return embed(x.reshape(b, grid * grid, patch * patch * channels))

    def _special_tokens(self, b: int) -> list[Float[Array, "b n d"]]:
        tokens = []
        if self.class_token:
            shape = (1, self.width)
            tokens.append(initializers.param(self, "class_token", initializers.ZEROS, shape))
        if self.num_registers:
            init, shape = initializers.Normal(0.02), (self.num_registers, self.width)
            tokens.append(initializers.param(self, "registers", init, shape))
        return [jnp.broadcast_to(token, (b, *token.shape)) for token in tokens]

    def _pool(self, x: Float[Array, "b l d"], mask: None, *, train: bool) -> TowerOutput:
        del mask
        if self.final_norm == "before_pool":
            x = self.norm("final_norm")(x)
        if self.pool == "cls":
            pooled = x[:, 0]
        elif self.pool == "attention":
            pooled = self._map_head(x, train=train)
        else:
            skip = self.class_token + self.num_registers if self.pool == "mean" else 0
            pooled = x[:, skip:].mean(1)
        if self.final_norm == "after_pool":
            pooled = self.norm("final_norm")(pooled)
        return TowerOutput(pooled, x)


class PatchEmbed(nn.Module):
    """The convolution of ViT as one product with flattened patches [p p c]; kernel [p p c d]."""

    width: int
    patch_size: int
    use_bias: bool
    dtype: layers.Dtype = jnp.float32
    hand_written_gradients: bool = True

    @nn.compact
    def __call__(self, patches: Float[Array, "b l i"]) -> Float[Array, "b l d"]:
        size = self.patch_size
        shape = (size, size, patches.shape[-1] // size**2, self.width)
        kernel = initializers.param(self, "kernel", initializers.LECUN_NORMAL, shape)
        bias = None
        if self.use_bias:
            bias = initializers.param(self, "bias", initializers.ZEROS, (self.width,))
        return layers.dense(
            patches,
            kernel.reshape(-1, self.width),
            bias,
            dtype=self.dtype,
            hand_written_gradients=self.hand_written_gradients,
        )


def drop_patches(x: Float[Array, "b l d"], key: jax.Array, *, rate: float) -> Float[Array, "b m d"]:
    """Return a random subset of each example's patches, in order (2212.00794).

    At least one patch is retained.
    """
    b, length, _ = x.shape
    keep = max(1, round(length * (1 - rate)))
    order = jnp.argsort(jax.random.uniform(key, (b, length)), axis=1)[:, :keep]
    return jnp.take_along_axis(x, jnp.sort(order, axis=1)[..., None], axis=1)
