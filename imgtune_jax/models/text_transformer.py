"""A pre-norm text transformer: that of CLIP (causal) or of SigLIP (bidirectional).

EOT is the end-of-text token. Axis letters: m = l tokens, or l + 1 with a class token.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.errors import UserError
from imgtune_jax.models import initializers, layers, pooling
from imgtune_jax.models.block import LayerCache
from imgtune_jax.models.transformer import LayerCaches, TextTower

TOKEN_INIT, POSITION_INIT = initializers.Normal(0.02), initializers.Normal(0.01)


class TextTransformer(TextTower):
    """Text tower of CLIP, SigLIP or CoCa, depending on `causal` and `pool`.

    `pool` is one of
      eot        the last position where `text_mask` is True. CLIP's argmax(token id) is the same,
                 but would fail if a token with a higher id were added to the vocabulary.
      last       position l-1 independently of the mask: SigLIP, whose texts are padded to exactly
                 `max_length`. Another length is an error, since it would change the scores.
      first      position 0.
      mean       the mean over the positions where `text_mask` is True.
      attention  one learned query over those positions (see MAPHead).
      class      a learned token after position l-1. Its vector is normalized. The output tokens do
                 not include it, and are not normalized, since a decoder reads them (CoCa,
                 2205.01917, as open_clip builds it).

    `shifted_class_mask` reproduces a mistake that open_clip's CoCa weights were trained with: the
    key mask is shifted by one position, so the class token of a padded text attends to the first
    padding token instead of to itself.

    `mask_padding` hides padding keys from every query; SigLIP needs False. With CLIP's causal mask,
    the pooled vector does not depend on it, since EOT attends to no later position anyway.

    Token embeddings are initialized with standard deviation 0.02 and position embeddings with 0.01,
    as in CLIP; matrices are Xavier normal. `hand_written_gradients=True` supports reverse mode
    only, as in Transformer.
    """

    CONFIG_NAME: ClassVar[str] = "text_transformer"

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

    def init_cache(self, batch: int, length: int) -> LayerCaches:
        """Return empty caches for `decode_step`, with capacity for `length` tokens."""
        return (LayerCache(self.init_kv_cache(batch, length), None),) * self.depth

    def decode_step(
        self, token: Int[Array, " b"], caches: LayerCaches, position: Int[Array, " b"]
    ) -> tuple[Float[Array, "b 1 d"], LayerCaches]:
        """Return the token of one position per row of a causal tower, and the updated caches."""
        params = self.variables["params"]
        x = layers.lookup(params["token_embed"]["embedding"], token)
        x = x + params["pos_embed"][position]
        x, caches = self.decode_blocks(self.block(), x[:, None], caches, position)
        return x if self.pool == "class" else self.apply_norm("final_norm", x), caches

    def _block_fields(self) -> dict[str, Any]:
        return dict(causal=self.causal)

    def _embed(self, inputs: Int[Array, "b l"], *, train: bool) -> Float[Array, "b m d"]:
        self._check_length(inputs.shape[1])
        num_positions = self.max_length + (self.pool == "class")
        x, position = self._embed_tokens(inputs, TOKEN_INIT, POSITION_INIT, num_positions)
        if self.pool == "class":  # with the last position embedding, independently of l
            token = initializers.param(self, "class_token", POSITION_INIT, (1, self.width))
            token = jnp.broadcast_to(token + position[-1:], (len(x), 1, self.width))
            x = jnp.concatenate([x, token], axis=1)
        return nn.Dropout(self.dropout, deterministic=not train)(x)

    def _check_length(self, length: int) -> None:
        super()._check_length(length)
        if self.pool == "last" and length != self.max_length:
            raise UserError(
                f"pool='last' reads the last position, so text must be padded to exactly "
                f"max_length={self.max_length}; got {length}"
            )

    def _key_mask(self, mask: Bool[Array, "b l"]) -> Bool[Array, "b m"] | None:
        if not self.mask_padding:
            return None
        if self.pool != "class":
            return mask
        true = jnp.ones((len(mask), 1), bool)
        return jnp.concatenate([true, mask] if self.shifted_class_mask else [mask, true], axis=1)

    def _pool(
        self, x: Float[Array, "b m d"], mask: Bool[Array, "b l"], *, train: bool
    ) -> pooling.TowerOutput:
        norm = self.norm("final_norm")
        if self.pool == "class":
            return pooling.TowerOutput(norm(x[:, -1]), x[:, :-1])
        x = norm(x)
        return pooling.TowerOutput(self._pool_tokens(x, mask, train=train), x)

    def _pool_tokens(self, x: Array, mask: Array, *, train: bool) -> Array:
        if self.pool == "eot":
            index = pooling.last_true_index(mask)[:, None, None]
            return jnp.take_along_axis(x, index, axis=1)[:, 0]
        if self.pool == "last":
            return x[:, -1]
        if self.pool == "first":
            return x[:, 0]
        if self.pool == "mean":
            return pooling.masked_mean(x, mask)
        if self.pool == "attention":
            return self._map_head(x, mask, train=train)
        raise UserError(
            f"text_transformer pool = {self.pool!r}; expected 'eot', 'last', 'first', 'mean', "
            "'attention' or 'class'"
        )
