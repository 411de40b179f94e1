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
from imgtune_jax.evals.protocol import Written
from imgtune_jax.types import Params


@dataclass(frozen=True)
class Writer:
    """Writes behind a prompt: a pure function of parameters, image tokens, prompt and a key.

    Equal ones are one compiled program, whatever the prompts say.
    """

    model: models.Model
    settings: decoding.Decoding

    @classmethod
    def build(
        cls,
        model: models.Model,
        tokenizer: data.Tokenizer,
        *,
        prompt_length: int,
        settings: Mapping[str, Any],
    ) -> Writer:
        """Of what `decoding.build` takes; a caption may be as long as the model can still write.

        Raises ValueError for a model without a decoder, for a tokenizer without an end token, for
        an unknown setting, or a max_length that the model cannot write.
        """
        if model.decoder is None:
            raise ValueError(
                "this model has no decoder, so it writes no captions; it was trained to match "
                "images and texts (to write, train one with config.model.decoder)"
            )
        if not tokenizer.end:
            raise ValueError("this tokenizer puts no end token behind a text: captions cannot end")
        room = min(tokenizer.length, model.decoder.max_length) - prompt_length
        wanted = settings.get("max_length", room)
        if wanted > room:
            raise ValueError(f"max_length = {wanted}; this model writes at most {room} tokens here")
        built = decoding.build(
            {**settings, "max_length": wanted}, stop=tokenizer.end[:1], pad=tokenizer.pad_id
        )
        return cls(model, built)

    def __call__(
        self,
        params: Params,
        image_tokens: Float[Array, "b m e"],
        prompt: Int[Array, " p"],
        key: Array,
    ) -> decoding.Generated:
        """`n` captions of each image; the key is for methods that draw."""
        prompts = jnp.broadcast_to(prompt, (len(image_tokens), len(prompt)))
        generator = decoding.Generator(
            self.model.decoder_cache,
            self.model.decode_step,
            self.settings,
            longest=self.model.decoder.max_length,
            constrain=self.model.constrain,
        )
        draws = isinstance(self.settings.method, decoding.Sample)
        return generator(
            params, image_tokens, prompts, np.ones(prompts.shape, bool), key=key if draws else None
        )

    def read(self, out: decoding.Generated, tokenizer: data.Tokenizer) -> list[list[Written]]:
        """The texts of each row, best first, without what a narrow beam left empty."""
        tokens, mask, score = jax.device_get((out.tokens, out.mask, out.score))
        return [
            [
                Written(text, float(x))
                for text, x in zip(tokenizer.decode(_kept(t, m)), own, strict=True)
                if np.isfinite(x)
            ]
            for t, m, own in zip(tokens, mask, score, strict=True)
        ]


def _kept(tokens: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    return [row[own].tolist() for row, own in zip(tokens, mask, strict=True)]
