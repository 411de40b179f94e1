"""An image tower with a text tower, a caption decoder or both: CLIP, LiT, SigLIP, Cap, CoCa.

Axis letters: e width of a tower's features or tokens, m image tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from imgtune_jax.errors import UserError
from imgtune_jax.models import layers
from imgtune_jax.models.components import ModelComponents
from imgtune_jax.models.decoder import DecoderCache
from imgtune_jax.models.token_scores import token_scores
from imgtune_jax.types import MODALITIES, Batch, Outputs, Params, TokenScores


def unit_norm(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Return x / max(|x|, 1e-12) in float32. A zero row stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def clamp_log_scale(t: Float[Array, ""], maximum: float) -> Float[Array, ""]:
    """Return min(t, maximum), with a gradient that can lower a `t` above the maximum.

    There, a gradient passes if gradient descent would lower `t`, and is zero otherwise. With
    `jnp.minimum` it would always be zero, so a `t` above the maximum could never return.
    """
    return jnp.minimum(t, maximum)


def _clamp_forward(t: Array, maximum: float) -> tuple[Array, Array]:
    return jnp.minimum(t, maximum), t


def _clamp_backward(maximum: float, t: Array, g: Array) -> tuple[Array]:
    return (jnp.where((t < maximum) | (g > 0), g, 0.0),)


clamp_log_scale.defvjp(_clamp_forward, _clamp_backward)


@dataclasses.dataclass(frozen=True)
class ImageTextModel(ModelComponents):
    """A contrastive model (CLIP), a captioner (Cap), or both.

    A text tower and heads make the model contrastive; a decoder makes it a captioner. If it is
    both, the decoder may read the text tower's tokens, and one forward pass computes all outputs
    (CoCa, 2205.01917).
    """

    def apply(
        self, params: Params, batch: Batch, *, rng: jax.Array | None = None, train: bool = False
    ) -> Outputs:
        """Return the outputs for which the batch has inputs. Training needs `rng`, for dropout.

        `batch.image_features` and `batch.text_features`, if given, are outputs of
        `apply_frozen_prefix`.
        """
        outputs = {
            tower: self.apply_tower(params, tower, batch, rng, train) for tower in MODALITIES
        }
        embs = {}
        for tower, out in outputs.items():
            if out is not None and getattr(self, f"{tower}_head") is not None:
                embs[f"{tower}_emb"] = self._project(params, tower, out.pooled, rng, train)
        scores, image, text = None, outputs["image"], outputs["text"]
        if self.decoder is not None and image is not None and batch.text is not None:
            tokens = None if text is None else text.tokens
            scores = self._score_tokens(params, image.tokens, batch.text, tokens, rng, train)
        scale, bias = self.logit_scale(params), self.logit_bias(params)
        return Outputs(**embs, logit_scale=scale, logit_bias=bias, token_scores=scores)

    def logit_scale(self, params: Params) -> Float[Array, ""] | None:
        """Return the clamped multiplier of the logits; None for a model without a text tower."""
        if self.text is None:
            return None
        t = params["logit_scale"].astype(jnp.float32)
        if self.logit_scale_max is not None:
            t = cast(Array, clamp_log_scale(t, self.logit_scale_max))
        return jnp.exp(t)

    def logit_bias(self, params: Params) -> Float[Array, ""] | None:
        """Return the bias of the logits; None if this model has none."""
        if self.logit_bias_init is None:
            return None
        return params["logit_bias"].astype(jnp.float32)

    def image_features(self, params: Params, image: UInt8[Array, "b h w c"]) -> Float[Array, "b e"]:
        """Return the pooled vectors of images, before the head, in float32."""
        return self._image(params, image, "pooled")

    def text_features(
        self, params: Params, text: Int[Array, "b l"], text_mask: Bool[Array, "b l"]
    ) -> Float[Array, "b e"]:
        """Return the pooled vectors of texts, before the head, in float32."""
        return self.apply_tower_eval(params, "text", (text, text_mask), lambda out: out.pooled)

    def tower_features(self, params: Params, batch: Batch) -> dict[str, Float[Array, "b e"]]:
        """Return the pooled vectors of a batch by tower, before the heads, in float32."""
        outputs = {tower: self.apply_tower(params, tower, batch) for tower in MODALITIES}
        return {
            tower: out.pooled.astype(jnp.float32)
            for tower, out in outputs.items()
            if out is not None
        }

    def encode_image(self, params: Params, image: UInt8[Array, "b h w c"]) -> Float[Array, "b d"]:
        """Return unit-norm embeddings of uint8 RGB images."""
        return self.project_image_features(params, self.image_features(params, image))

    def project_image_features(
        self, params: Params, features: Float[Array, "b e"]
    ) -> Float[Array, "b d"]:
        """Return unit-norm embeddings of the vectors of `image_features`."""
        return self._project(params, "image", features, None, False)

    def encode_text(
        self, params: Params, text: Int[Array, "b l"], text_mask: Bool[Array, "b l"]
    ) -> Float[Array, "b d"]:
        """Return unit-norm embeddings of token ids."""
        return self._project(
            params, "text", self.text_features(params, text, text_mask), None, False
        )

    def image_tokens(self, params: Params, image: UInt8[Array, "b h w c"]) -> Float[Array, "b m e"]:
        """Return the tokens of uint8 RGB images in float32, as the decoder reads them."""
        return self._image(params, image, "tokens")

    def caption_scores(
        self,
        params: Params,
        image_tokens: Float[Array, "b m e"],
        text: Int[Array, "b l"],
        text_mask: Bool[Array, "b l"],
    ) -> TokenScores:
        """Return the scores of captions in eval mode, without holding logits [b l v] in memory."""
        return self._score_tokens(
            params, image_tokens, text, self._text_tokens(params, text, text_mask)
        )

    def caption_logits(
        self,
        params: Params,
        image_tokens: Float[Array, "b m e"],
        text: Int[Array, "b l"],
        text_mask: Bool[Array, "b l"],
        *,
        parallel: Bool[Array, " b"] | None = None,
    ) -> Float[Array, "b l v"]:
        """Return the logits for the token after each position, in eval mode.

        All logits are in memory at once, so it is for tests and small sizes. `parallel` selects the
        rows that predict from position embeddings alone, without reading the text (CapPa); `text`
        must then omit its last position.
        """
        tokens = self._text_tokens(params, text, text_mask)
        inputs = text if tokens is None else tokens
        hidden = self.apply_component(params, "decoder", inputs, image_tokens, parallel=parallel)
        return self._logits(params, hidden)

    def decoder_cache(
        self, params: Params, image_tokens: Float[Array, "b m e"], *, length: int
    ) -> DecoderCache:
        """Return a cache for decoding up to `length` tokens. All leaves have one row per image.

        Raises UserError if `length` exceeds the decoder's max_length.
        """
        if not 0 < length <= self.decoder.max_length:
            raise UserError(
                f"length = {length}; this decoder generates 1 to {self.decoder.max_length} tokens"
            )
        b = len(image_tokens)
        caches = self._apply_decoding(
            params, "decoder", image_tokens, length=length, method="init_cache"
        )
        text = ()
        if self.decoder.input_from == "text_tower":
            text = self.text.init_cache(b, length)
        return DecoderCache(jnp.zeros(b, jnp.int32), caches, text)

    def decode_step(
        self, params: Params, cache: DecoderCache, token: Int[Array, " b"]
    ) -> tuple[Float[Array, "b v"], DecoderCache]:
        """Return the logits for the token after `token`, and the updated cache.

        `token` is at position `cache.position` of each row.
        """
        inputs, text, position = token, cache.text, cache.position
        if self.decoder.input_from == "text_tower":
            inputs, text = self._apply_decoding(params, "text", token, text, position)
        hidden, caches = self._apply_decoding(params, "decoder", inputs, cache.decoder, position)
        return self._logits(params, hidden), DecoderCache(position + 1, caches, text)

    def _apply_decoding(
        self, params: Params, name: str, *inputs, method: str = "decode_step", **options
    ):
        module = getattr(self, name)
        return module.apply({"params": params[name]}, *inputs, method=method, **options)

    def _logits(self, params: Params, hidden: Float[Array, "*n d"]) -> Float[Array, "*n v"]:
        return layers.dense(
            hidden,
            *self.decoder.vocab_weights(params["decoder"]),
            dtype=self.decoder.dtype,
            hand_written_gradients=self.decoder.hand_written_gradients,
        )

    def _text_tokens(self, params: Params, text: Array, mask: Array) -> Array | None:
        if self.decoder is None or self.decoder.input_from == "ids":
            return None
        return self.apply_component(params, "text", text, mask).tokens

    def _score_tokens(
        self,
        params: Params,
        image_tokens: Array,
        text: Array,
        text_tokens: Array | None,
        rng: jax.Array | None = None,
        train: bool = False,
    ) -> TokenScores:
        inputs = text if self.decoder.input_from == "ids" else text_tokens
        assert inputs is not None
        hidden = self.apply_component(
            params, "decoder", inputs[:, :-1], image_tokens, rng=rng, train=train
        )
        kernel, bias = self.decoder.vocab_weights(params["decoder"])
        return token_scores(
            hidden,
            kernel,
            text[:, 1:],
            bias=bias,
            chunk=self.decoder.chunk,
            dtype=self.decoder.dtype,
            constrain=self.constrain,
            hand_written_gradients=self.decoder.hand_written_gradients,
        )

    def _image(self, params: Params, image: Array, kind: str) -> Array:
        inputs = (self.normalize_images(image),)
        if self.image_pooler is None:
            return self.apply_tower_eval(params, "image", inputs, lambda out: getattr(out, kind))
        tokens = self.apply_tower_eval(params, "image", inputs, lambda out: out.tokens)
        return getattr(self.apply_component(params, "image_pooler", tokens), kind).astype(
            jnp.float32
        )

    def _project(
        self, params: Params, tower: str, features: Array, rng: jax.Array | None, train: bool
    ) -> Array:
        return unit_norm(
            self.apply_component(params, f"{tower}_head", features, rng=rng, train=train)
        )
