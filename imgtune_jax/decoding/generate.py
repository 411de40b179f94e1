"""From a model's step and a prompt to texts, compiled once a length bucket."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.decoding import beam_search, sampling
from imgtune_jax.decoding.prefill import DecodeStep, length_bucket, prefill
from imgtune_jax.decoding.settings import BeamSearch, GeneratedTokens, GenerationConfig, Sampling
from imgtune_jax.types import Constrain, Params, PyTree, no_constraint


def generate(
    step: DecodeStep,
    cache: PyTree,
    prompt: Int[Array, "b p"],
    prompt_mask: Bool[Array, "b p"],
    settings: GenerationConfig,
    *,
    key: Array | None = None,
    limit: Int[Array, ""] | int | None = None,
) -> GeneratedTokens:
    """Texts that continue the prompts; pure, and ready to be traced.

    `cache` has read nothing yet. A prompt stands at the left of its row, one token at least;
    padding is on its right. No prompt token is changed, none comes out, and no row influences
    another. `key` is for `Sample` alone. `limit`, at most max_new_tokens and that by default, may be a
    traced value. Raises ValueError for a missing or a useless key.
    """
    draws = isinstance(settings.method, Sampling)
    if draws != (key is not None):
        method = type(settings.method).__name__
        raise ValueError(f"{method} {'draws: pass a key' if draws else 'draws nothing: no key'}")
    n = settings.method.width if isinstance(settings.method, BeamSearch) else settings.method.n
    begin = prefill(step, cache, prompt, prompt_mask, n=n, max_new_tokens=settings.max_new_tokens)
    limit = jnp.asarray(settings.max_new_tokens if limit is None else limit, jnp.int32)
    if isinstance(settings.method, BeamSearch):
        return beam_search.beam_search(begin, settings, limit=limit)
    return sampling.sample(begin, settings, key=key, limit=limit)


@dataclass(frozen=True)
class Generator:
    """A model's way to write: `generator(params, inputs, prompt, prompt_mask) -> Generated`.

    `start(params, inputs, length=…)` gives the cache, `step(params, cache, token)` is one step of
    the model, which reads at most `longest` tokens (None: any number). `constrain` is the
    partitioner's. One program is compiled for each pair of prompt shape and length bucket of
    `settings.max_new_tokens`; results are those of the exact length.
    """

    start: Callable[..., PyTree]
    step: Callable[[Params, PyTree, Int[Array, " b"]], tuple[Float[Array, "b v"], PyTree]]
    settings: GenerationConfig
    max_positions: int | None = None
    constrain: Constrain = no_constraint

    def __call__(
        self,
        params: Params,
        inputs: Any,
        prompt: Int[Array | np.ndarray, "b p"],
        prompt_mask: Bool[np.ndarray, "b p"],
        *,
        key: Array | None = None,
    ) -> GeneratedTokens:
        """As `generate`; `inputs` (image tokens, say) and the texts are sharded by batch.

        Raises ValueError for a prompt that leaves no room for max_new_tokens tokens.
        """
        limit = self.settings.max_new_tokens
        written = int(np.sum(prompt_mask, 1).max())
        if (
            self.max_positions is not None and written + limit - 1 > self.max_positions
        ):  # the last is not read
            raise ValueError(
                f"a prompt of {written} tokens and max_new_tokens={limit} need {written + limit - 1} "
                f"positions, and the model has {self.max_positions}; a max_new_tokens of at most "
                f"{max(self.max_positions + 1 - written, 0)} fits this prompt"
            )
        settings = dataclasses.replace(self.settings, max_new_tokens=length_bucket(limit))
        program = dataclasses.replace(self, settings=settings)
        out = _run(program, params, inputs, prompt, prompt_mask, key, limit)
        return out.replace(tokens=out.tokens[..., :limit], mask=out.mask[..., :limit])


@partial(jax.jit, static_argnums=0)
def _run(
    program: Generator,
    params: Params,
    inputs: Any,
    prompt: Int[Array, "b p"],
    prompt_mask: Bool[Array, "b p"],
    key: Array | None,
    limit: Int[Array, ""],
) -> GeneratedTokens:
    def by_batch(x: Array) -> Array:
        return program.constrain(x, ("batch", *[None] * (x.ndim - 1)))

    length = prompt.shape[1] + program.settings.max_new_tokens
    length = length if program.max_positions is None else min(length, program.max_positions)
    cache = program.start(params, inputs, length=length)
    step = partial(program.step, params)
    prompt, prompt_mask = by_batch(prompt), by_batch(prompt_mask)
    out = generate(step, cache, prompt, prompt_mask, program.settings, key=key, limit=limit)
    return jax.tree.map(by_batch, out)
