"""A caption decoder: a causal transformer that attends to an image's tokens.

Axis letters: m image tokens of width e.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.errors import UserError
from imgtune_jax.models import initializers, layers
from imgtune_jax.models.block import Block, Cross, LayerCache
from imgtune_jax.models.transformer import LayerCaches, Transformer
from imgtune_jax.types import Params


@struct.dataclass
class DecoderCache:
    """The state of decoding between steps. Every leaf has one row per caption.

    `position` is the index of the next token. `decoder` and `text` are the keys and values of the
    decoder and, if it reads a text tower's tokens, of that tower.
    """

    position: Int[Array, " b"]
    decoder: LayerCaches
    text: LayerCaches = ()


class Decoder(Transformer):
    """Caption decoder: one vector per text position, from which the next token is predicted.

    `input_from` is "ids" (Cap: the decoder has token and position embeddings) or "text_tower"
    (CoCa: the decoder reads the output of a causal text tower of the same width). `cross` is as in
    Block. `context_norm` normalizes the image tokens first, for towers that do not normalize them.
    `tied` predicts with the token embeddings instead of a separate matrix. `vocab_bias` adds
    a bias to the logits. `use_bias=False` omits all biases of the blocks. `chunk` is the number of
    positions whose logits are in memory at once.

    `parallel_fraction` of the training examples, sampled at random, predict all their tokens in
    parallel (CapPa, 2306.07915). There is no causal mask for them, and the input at each position
    is one learned vector plus the position embedding. A shorter input would reveal the length of
    the caption, so texts must be padded to exactly `max_length`; another length is a UserError.

    Embeddings are initialized as in TextTransformer, matrices Xavier normal.
    `hand_written_gradients=True` supports reverse mode only, as in Transformer.
    """

    CONFIG_NAME: ClassVar[str] = "decoder"

    width: int = 768
    depth: int = 6
    mlp_dim: int = 3072
    num_heads: int = 12
    vocab_size: int = 32000
    max_length: int = 64
    input_from: Literal["ids", "text_tower"] = "ids"
    cross: Cross = "layer"
    context_norm: bool = False
    tied: bool = False
    parallel_fraction: float = 0.0
    chunk: int = 16
    use_bias: bool = True
    vocab_bias: bool = False

    @nn.compact
    def __call__(
        self,
        inputs: Int[Array, "b t"] | Float[Array, "b t d"],
        context: Float[Array, "b m e"],
        *,
        train: bool = False,
        parallel: Bool[Array, " b"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Return one vector per position; t is at most `max_length`.

        `parallel` selects the rows that predict in parallel. If None, they are sampled in training.
        """
        self._check(inputs)
        if parallel is None and train and self.parallel_fraction:
            rng = self.make_rng("dropout")
            parallel = jax.random.bernoulli(rng, self.parallel_fraction, inputs.shape[:1])
        if parallel is not None and inputs.shape[1] != self.max_length - 1:
            raise UserError(
                "parallel prediction would reveal the length of a text, so texts must be "
                f"padded to exactly max_length={self.max_length}; got {inputs.shape[1] + 1}"
            )
        x = inputs
        if self.input_from == "ids":
            x = self._embed(inputs, parallel, train=train and self.num_frozen_layers == 0)
        if self.context_norm:
            context = self.norm("context_norm")(context)
        mask = None
        if parallel is not None:
            causal = jnp.tril(jnp.ones((inputs.shape[1],) * 2, bool))
            mask = causal[None] | parallel[:, None, None]
        x = self.run_blocks(
            x,
            mask,
            train=train,
            context=context,
            causal=mask is None,
            cross=self.cross,
            use_bias=self.use_bias,
        )
        x = self.norm("final_norm")(x)
        if self.is_initializing() and not self.tied:
            layers.Dense(self.vocab_size, self.vocab_bias, name="vocabulary")(x[:1, 0])
        return x

    def vocab_weights(
        self, params: Params
    ) -> tuple[Float[Array, "d v"], Float[Array, " v"] | None]:
        """Return the kernel and the bias that map a position to logits, given the parameters."""
        if self.tied:
            return params["token_embed"]["embedding"].T, None
        return params["vocabulary"]["kernel"], params["vocabulary"].get("bias")

    def init_cache(self, context: Float[Array, "b m e"], *, length: int) -> LayerCaches:
        """Return caches for `decode_step`, with image keys and capacity for `length` tokens."""
        params = self.variables["params"]
        if self.context_norm:
            context = self.apply_norm("context_norm", context)
        empty, apply = self.init_kv_cache(len(context), length), cast(Any, self._block().apply)
        return tuple(
            LayerCache(
                empty,
                apply({"params": params[f"blocks_{i}"]}, context, method="project_context"),
            )
            for i in range(self.depth)
        )

    def decode_step(
        self,
        inputs: Int[Array, " b"] | Float[Array, "b 1 d"],
        caches: LayerCaches,
        position: Int[Array, " b"],
    ) -> tuple[Float[Array, "b d"], LayerCaches]:
        """Return the vector of one position per row, and the updated caches."""
        params, x = self.variables["params"], inputs
        if self.input_from == "ids":
            x = layers.lookup(params["token_embed"]["embedding"], inputs)
            x = (x + params["pos_embed"][position])[:, None]
        x, caches = self.decode_blocks(self._block(), x, caches, position)
        return self.apply_norm("final_norm", x)[:, 0], caches

    def _block(self) -> Block:
        return self.block(cross=self.cross, use_bias=self.use_bias)

    def _check(self, inputs: Array) -> None:
        length, ids = inputs.shape[1], inputs.ndim == 2
        if self.tied and self.vocab_bias:
            raise UserError(
                "a decoder with tied=True has no vocabulary matrix, which vocab_bias=True belongs "
                "to; set one of them to False"
            )
        if length > self.max_length:
            raise UserError(
                f"captions of {length} tokens, but the decoder has max_length={self.max_length}; "
                "truncate in the tokenizer (and keep the end token)"
            )
        if ids != (self.input_from == "ids") or (not ids and inputs.shape[-1] != self.width):
            raise UserError(
                f"decoder input_from = {self.input_from!r} with width={self.width} got an input "
                f"of shape {inputs.shape}; set its width to that of the text tower"
            )
        if not ids and (self.tied or self.parallel_fraction):
            raise UserError(
                "a decoder with input_from='text_tower' has no embeddings; "
                "set tied=False and parallel_fraction=0"
            )

    def _embed(
        self, ids: Int[Array, "b t"], parallel: Bool[Array, " b"] | None, *, train: bool
    ) -> Float[Array, "b t d"]:
        x = layers.Embed(self.vocab_size, self.width, name="token_embed")(ids)
        shape = (self.max_length, self.width)
        position = initializers.param(self, "pos_embed", initializers.Normal(0.01), shape)
        if self.parallel_fraction:
            init = initializers.Normal(0.02)
            mask_embed = initializers.param(self, "mask_embed", init, (self.width,))
            if parallel is not None:
                x = jnp.where(parallel[:, None, None], layers.expand_like(mask_embed, x), x)
        x = x + position[None, : ids.shape[1]]
        return nn.Dropout(self.dropout, deterministic=not train)(x)
