"""Processors of the next token's scores: minimum length, repetition penalty, no repeated n-gram."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.decoding.settings import GenerationConfig


def process_scores(
    logp: Float[Array, "b n v"],
    context: Int[Array, "b n t"],
    length: Int[Array, "b n"],
    count: Int[Array, ""],
    settings: GenerationConfig,
) -> Float[Array, "b n v"]:
    """Return log p with the repetition penalty applied, and -inf for forbidden tokens.

    The first `length` entries of `context` are the prompt and the generated tokens; the last
    `count` of these are generated.
    """

    def process_one(
        logp: Float[Array, " v"], context: Int[Array, " t"], length: Int[Array, ""]
    ) -> Float[Array, " v"]:
        if settings.repetition_penalty != 1:
            seen = _token_mask(context, jnp.arange(len(context)) < length, len(logp))
            logp = jnp.where(seen, settings.repetition_penalty * logp, logp)
        if settings.no_repeat_ngram_size is not None:
            logp = jnp.where(_repeats_ngram(context, length, len(logp), settings), -jnp.inf, logp)
        if settings.min_new_tokens:
            early = is_stop(jnp.arange(len(logp)), settings) & (count < settings.min_new_tokens)
            logp = jnp.where(early, -jnp.inf, logp)
        return logp

    return jax.vmap(jax.vmap(process_one))(logp, context, length)


def is_stop(token: Int[Array, "*s"], settings: GenerationConfig) -> Bool[Array, "*s"]:
    """Return whether a token finishes its sequence."""
    return jnp.isin(token, jnp.asarray(settings.stop_ids, token.dtype))


def _repeats_ngram(
    context: Int[Array, " t"], length: Int[Array, ""], vocab_size: int, settings: GenerationConfig
) -> Bool[Array, " v"]:
    """Return the mask of tokens that would complete an n-gram that the context contains."""
    n = settings.no_repeat_ngram_size
    assert n is not None
    starts = jnp.arange(max(len(context) - n + 1, 0))
    same = starts + n <= length  # only n-grams within the first `length` tokens
    for i in range(n - 1):
        same &= context[starts + i] == context[length - (n - 1) + i]
    return _token_mask(context[starts + n - 1], same, vocab_size)


def _token_mask(
    tokens: Int[Array, " t"], selected: Bool[Array, " t"], vocab_size: int
) -> Bool[Array, " v"]:
    """Return the mask over the vocabulary of the selected tokens."""
    return jnp.zeros(vocab_size, bool).at[tokens].max(selected)
