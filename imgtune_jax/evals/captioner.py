"""Captions in batches of one size: image tokens in, texts out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from imgtune_jax import data, decoding, models
from imgtune_jax.evals.protocol import GeneratedCaption
from imgtune_jax.types import Params


@dataclass(frozen=True)
class Captioner:
    """Writes behind a prompt: a pure function of parameters, image tokens, prompt and a key.

    Equal ones are one compiled program, whatever the prompts say.
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
        """Of what `decoding.build` takes; a caption may be as long as the model can still write.

        Raises ValueError for a model without a decoder, for a tokenizer without an end token, for
        an unknown setting, or a max_length that the model cannot write.
        """
        if model.decoder is None:
            raise ValueError(
                "this model has no decoder, so it writes no captions; it was trained to match "
                "images and texts (to write, train one with config.model.decoder)"
            )
        if not tokenizer.eos_ids:
            raise ValueError("this tokenizer puts no end token behind a text: captions cannot end")
        room = min(tokenizer.length, model.decoder.max_length) - prompt_length
        wanted = settings.get("max_new_tokens", room)
        if wanted > room:
            raise ValueError(
                f"max_new_tokens = {wanted}; this model writes at most {room} tokens here"
            )
        built = decoding.build_generation_config(
            {**settings, "max_new_tokens": wanted},
            stop_ids=tokenizer.eos_ids[:1],
            pad_id=tokenizer.pad_id,
        )
        return cls(model, built)

    def __call__(
        self,
        params: Params,
        image_tokens: Float[Array, "b m e"],
        prompt: Int[Array, " p"],
        key: Array,
    ) -> decoding.GeneratedTokens:
        """`n` captions of each image; the key is for methods that draw."""
        prompts = jnp.broadcast_to(prompt, (len(image_tokens), len(prompt)))
        generator = decoding.Generator(
            self.model.decoder_cache,
            self.model.decode_step,
            self.settings,
            max_positions=self.model.decoder.max_length,
            constrain=self.model.constrain,
        )
        draws = isinstance(self.settings.method, decoding.Sampling)
        return generator(
            params, image_tokens, prompts, np.ones(prompts.shape, bool), key=key if draws else None
        )

    def to_captions(
        self, out: decoding.GeneratedTokens, tokenizer: data.Tokenizer
    ) -> list[list[GeneratedCaption]]:
        """The texts of each row, best first, without what a narrow beam left empty."""
        tokens, mask, score = jax.device_get((out.tokens, out.mask, out.score))
        return [
            [
                GeneratedCaption(text, float(x))
                for text, x in zip(tokenizer.decode(_unpad(t, m)), own, strict=True)
                if np.isfinite(x)
            ]
            for t, m, own in zip(tokens, mask, score, strict=True)
        ]


def _unpad(tokens: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    return [row[own].tolist() for row, own in zip(tokens, mask, strict=True)]
