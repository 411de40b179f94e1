"""Caption generation for one batch: image tokens in, captions out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from imgtune_jax import data, decoding, models
from imgtune_jax.errors import UserError
from imgtune_jax.evals.protocol import GeneratedCaption
from imgtune_jax.types import Params


@dataclass(frozen=True)
class Captioner:
    """Generates captions: a pure function of parameters, image tokens, a prompt, and a random key.

    Instances are hashable. A predictor compiles one function per model and settings, and reuses it
    for all prompts of the same length.
    """

    model: models.ImageTextModel
    settings: decoding.GenerationConfig

    @classmethod
    def build(
        cls,
        model: models.ImageTextModel,
        tokenizer: data.Tokenizer,
        *,
        prompt_length: int,
        settings: Mapping[str, Any],
    ) -> Captioner:
        """Build from the settings that `decoding.build_generation_config` takes.

        `max_new_tokens` defaults to the number of tokens that fit after the prompt. Raises
        UserError for a model without a decoder, a tokenizer without an end token, an unknown
        setting, and a `max_new_tokens` that does not fit.
        """
        if model.decoder is None:
            raise UserError(
                "this model has no decoder, so it cannot generate captions; train one with "
                "config.model.decoder"
            )
        if not tokenizer.eos_ids:
            raise UserError(
                "this tokenizer adds no end token, so generation cannot stop; expected a tokenizer "
                "that ends each text with a special token"
            )
        capacity = min(tokenizer.length, model.decoder.max_length) - prompt_length
        max_new_tokens = settings.get("max_new_tokens", capacity)
        if max_new_tokens > capacity:
            raise UserError(
                f"max_new_tokens = {max_new_tokens}; this model generates at most {capacity} "
                f"tokens after a prompt of {prompt_length} tokens; lower max_new_tokens"
            )
        config = decoding.build_generation_config(
            {**settings, "max_new_tokens": max_new_tokens},
            stop_ids=tokenizer.eos_ids[:1],
            pad_id=tokenizer.pad_id,
        )
        return cls(model, config)

    def __call__(
        self,
        params: Params,
        image_tokens: Float[Array, "b m e"],
        prompt: Int[Array, " p"],
        key: Array,
    ) -> decoding.GeneratedTokens:
        """Generate `settings.method.n` sequences for each of b images with m tokens of width e.

        All images have the same prompt of p token ids. Only sampling uses `key`.
        """
        prompts = jnp.broadcast_to(prompt, (len(image_tokens), len(prompt)))
        generator = decoding.Generator(
            self.model.decoder_cache,
            self.model.decode_step,
            self.settings,
            max_positions=self.model.decoder.max_length,
            constrain=self.model.constrain,
        )
        uses_key = isinstance(self.settings.method, decoding.Sampling)
        return generator(
            params,
            image_tokens,
            prompts,
            np.ones(prompts.shape, bool),
            key=key if uses_key else None,
        )

    def to_captions(
        self, generated: decoding.GeneratedTokens, tokenizer: data.Tokenizer
    ) -> list[list[GeneratedCaption]]:
        """Return each row's captions, without the empty sequences of beam search (score -inf)."""
        tokens, mask, scores = jax.device_get((generated.tokens, generated.mask, generated.score))
        return [
            [
                GeneratedCaption(text, float(score))
                for text, score in zip(
                    tokenizer.decode(_unpad(row_tokens, row_mask)), row_scores, strict=True
                )
                if np.isfinite(score)
            ]
            for row_tokens, row_mask, row_scores in zip(tokens, mask, scores, strict=True)
        ]


def _unpad(tokens: Int[np.ndarray, "n l"], mask: np.ndarray) -> list[list[int]]:
    return [ids[valid].tolist() for ids, valid in zip(tokens, mask, strict=True)]
