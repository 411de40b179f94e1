"""A pre-norm text transformer: CLIP's (causal, pooled at EOT) and SigLIP's (bidirectional)."""

from __future__ import annotations

from typing import Any, Literal, cast

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.models import initializers, layers, pooling, sizes
from imgtune_jax.models.block import LayerCache
from imgtune_jax.models.layer_stack import Part
from imgtune_jax.models.transformer import LayerCaches, Transformer


class TextTransformer(Transformer):
    """Token ids to a vector.

    `pool` is one of
      eot        the last position where `text_mask` holds. Not argmax(token id), which breaks as
                 soon as a token is added.
      last       position l-1 whatever the mask: SigLIP, whose texts are padded to exactly
                 `max_length`; another length is an error, since it would change the scores.
      first      position 0.
      mean       over the positions where `text_mask` holds.
      attention  one learned query over those positions (see AttentionPool).
      class      a learned token behind position l-1, which has no place in the tokens. Its own
                 vector is normalised, the tokens are not: they are a decoder's input (CoCa,
                 2205.01917, as open_clip builds it).

    `shifted_class_mask` repeats a mistake that open_clip's CoCa weights were trained with: keys
    are masked one position late, so that the class token sees the first padding and not itself.

    `mask_padding` hides padding keys from every query; SigLIP needs False. CLIP's causal mask
    alone hides what comes after EOT, so there the pooled vector is the same either way.

    From scratch: token and position embeddings normal(0.02) and normal(0.01) as in CLIP, matrices
    Xavier normal.
    """

    width: int = 512
    depth: int = 12
    mlp_dim: int = 2048
    num_heads: int = 8
    vocab_size: int = 49408
    max_length: int = 77
    causal: bool = True
    mask_padding: bool = True
    pool: Literal["eot", "last", "first", "mean", "attention", "class"] = "eot"
    shifted_class_mask: bool = False
    act: str = "gelu"
    norm_epsilon: float = 1e-5

    @classmethod
    def variant_fields(cls, variant: str) -> dict[str, Any]:
        """The sizes behind "Ti", "S", "B", …"""
        return sizes.get_variant(sizes.SIZES, variant, "text_transformer")

    @nn.compact
    def __call__(
        self,
        text: Int[Array, "b l"],
        text_mask: Bool[Array, "b l"],
        *,
        train: bool,
        part: Part = "whole",
    ) -> pooling.TowerOutput | Array:
        self._check(text.shape[1])
        x = text
        if part != "rest":
            x = self._embed(text, train=train and self.num_frozen_layers == 0)
        mask = self._key_mask(text_mask)
        x = self.run_blocks(x, mask, train=train, part=part, causal=self.causal)
        if part == "front":
            return x
        norm = layers.LayerNorm(self.norm_epsilon, name="final_norm")
        if self.pool == "class":
            return pooling.TowerOutput(norm(x[:, -1]), x[:, :-1])
        x = norm(x)
        pooled = self._pool(x, text_mask, train=train and self.num_frozen_layers != -1)
        return pooling.TowerOutput(pooled, x)

    def _check(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(
                f"text of {length} tokens, but text_transformer has max_length={self.max_length}; "
                "truncate in the tokenizer (and keep EOT)"
            )
        if self.pool == "last" and length != self.max_length:
            raise ValueError(
                f"pool='last' reads the last position, so text must be padded to exactly "
                f"max_length={self.max_length}; got {length}"
            )

    def _embed(self, text: Int[Array, "b l"], *, train: bool) -> Float[Array, "b l d"]:
        token = layers.Embed(self.vocab_size, self.width, name="token_embed")
        shape = (self.max_length + (self.pool == "class"), self.width)
        position = self.param("pos_embed", initializers.normal(0.01), shape, jnp.float32)
        x = token(text) + position[None, : text.shape[1]]
        if self.pool == "class":  # always at the last position: shorter padding moves nothing
            own = self.param("class_token", initializers.normal(0.01), (1, self.width), jnp.float32)
            own = jnp.broadcast_to(own + position[-1:], (len(x), 1, self.width))
            x = jnp.concatenate([x, own], axis=1)
        return nn.Dropout(self.dropout, deterministic=not train)(x)

    def _key_mask(self, mask: Bool[Array, "b l"]) -> Bool[Array, "b m"] | None:
        if not self.mask_padding:
            return None
        if self.pool != "class":
            return mask
        one = jnp.ones((len(mask), 1), bool)
        return jnp.concatenate([one, mask] if self.shifted_class_mask else [mask, one], axis=1)

    def init_cache(self, batch: int, length: int) -> LayerCaches:
        """What the first `step` starts from: room for `length` tokens."""
        return (LayerCache(self.init_kv_cache(batch, length), None),) * self.depth

    def decode_step(
        self, token: Int[Array, " b"], caches: LayerCaches, position: Int[Array, " b"]
    ) -> tuple[Float[Array, "b 1 d"], LayerCaches]:
        """The tokens' output, one position of each row at a time; for a causal tower."""
        own = self.variables["params"]
        x = own["token_embed"]["embedding"][token] + own["pos_embed"][position]
        x, caches = self.decode_blocks(self.block(), x[:, None], caches, position)
        if self.pool != "class":
            norm = layers.LayerNorm(self.norm_epsilon, parent=None)
            x = cast(Array, norm.apply({"params": own["final_norm"]}, x))
        return x, caches

    def _pool(self, x: Array, mask: Array, *, train: bool) -> Array:
        if self.pool == "eot":
            return jnp.take_along_axis(x, pooling.last_true_index(mask)[:, None, None], axis=1)[
                :, 0
            ]
        if self.pool == "last":
            return x[:, -1]
        if self.pool == "first":
            return x[:, 0]
        if self.pool == "mean":
            return pooling.masked_mean(x, mask)
        if self.pool == "attention":
            return self.attention_pool(x, mask, train=train)
        raise ValueError(
            f"text_transformer pool={self.pool!r}; want 'eot', 'last', 'first', 'mean', "
            "'attention' or 'class'"
        )
