"""Generation from a model's step and prompts, compiled once per prompt shape and length bucket."""

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
from imgtune_jax.errors import UserError
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
    """Generate sequences that continue the prompts. The function is pure and can be traced.

    `cache` is empty. The prompts are padded on the right and have at least one token each. The
    result does not include prompt tokens. Rows do not influence each other. `key` is required for
    `Sampling` and must be None otherwise. `limit` is the maximum number of new tokens. It may be a
    traced value; its default and maximum is `settings.max_new_tokens`. Raises UserError for a
    missing or unused key.
    """
    is_sampling = isinstance(settings.method, Sampling)
    if is_sampling and key is None:
        raise UserError("key = None; sampling expects a random key; pass key=jax.random.key(seed)")
    if not is_sampling and key is not None:
        method = type(settings.method).__name__
        raise UserError(f"got a key; {method} is deterministic and expects key = None; pass no key")
    n = settings.method.width if isinstance(settings.method, BeamSearch) else settings.method.n
    prefilled = prefill(
        step, cache, prompt, prompt_mask, n=n, max_new_tokens=settings.max_new_tokens
    )
    limit = jnp.asarray(settings.max_new_tokens if limit is None else limit, jnp.int32)
    if isinstance(settings.method, BeamSearch):
        return beam_search.beam_search(prefilled, settings, limit=limit)
    return sampling.sample(prefilled, settings, key=key, limit=limit)


@dataclass(frozen=True)
class Generator:
    """A model and settings: `generator(params, inputs, prompt, prompt_mask) -> GeneratedTokens`.

    `init_cache(params, inputs, length=…)` returns an empty cache. `step(params, cache, token)`
    reads one token per row and returns the logits of the next token and the cache. The model has
    `max_positions` positions (None: no limit). `constrain` pins the sharding of an array, as
    `Partitioner.constrain` does. One program is compiled per prompt shape and `length_bucket` of
    `settings.max_new_tokens`. The result does not depend on the bucket.
    """

    init_cache: Callable[..., PyTree]
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
        """Generate as `generate` does. `inputs`, such as image tokens, have one row per prompt.

        Raises UserError if the prompt and the new tokens need more than `max_positions` positions.
        """
        limit = self.settings.max_new_tokens
        prompt_length = int(np.sum(prompt_mask, 1).max())
        num_positions = prompt_length + limit - 1  # the model does not read the last new token
        if self.max_positions is not None and num_positions > self.max_positions:
            raise UserError(
                f"max_new_tokens = {limit} with a prompt of {prompt_length} tokens needs "
                f"{num_positions} positions; the model has {self.max_positions}; use a "
                f"max_new_tokens of at most {max(self.max_positions + 1 - prompt_length, 0)} for "
                "this prompt"
            )
        settings = dataclasses.replace(self.settings, max_new_tokens=length_bucket(limit))
        bucket_generator = dataclasses.replace(self, settings=settings)
        out = _generate_bucket(bucket_generator, params, inputs, prompt, prompt_mask, key, limit)
        return out.replace(tokens=out.tokens[..., :limit], mask=out.mask[..., :limit])


@partial(jax.jit, static_argnums=0)
def _generate_bucket(
    generator: Generator,
    params: Params,
    inputs: Any,
    prompt: Int[Array, "b p"],
    prompt_mask: Bool[Array, "b p"],
    key: Array | None,
    limit: Int[Array, ""],
) -> GeneratedTokens:
    """Generate at most `limit` tokens per sequence, in arrays of the bucket's length."""

    def by_batch(x: Array) -> Array:
        return generator.constrain(x, ("batch", *[None] * (x.ndim - 1)))

    length = prompt.shape[1] + generator.settings.max_new_tokens
    length = length if generator.max_positions is None else min(length, generator.max_positions)
    cache = generator.init_cache(params, inputs, length=length)
    step = partial(generator.step, params)
    prompt, prompt_mask = by_batch(prompt), by_batch(prompt_mask)
    out = generate(step, cache, prompt, prompt_mask, generator.settings, key=key, limit=limit)
    return jax.tree.map(by_batch, out)
