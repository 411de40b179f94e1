"""Which tokens may come next: minimum length, repetition penalty, no n-gram twice."""

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
    """Scores of the next token: log p with the penalty, -inf where a rule forbids the token.

    `context` holds prompt and text so far in its first `length` entries; `count` of them are new.
    """

    def one(
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

    return jax.vmap(jax.vmap(one))(logp, context, length)


def is_stop(token: Int[Array, "*s"], settings: GenerationConfig) -> Bool[Array, "*s"]:
    """Whether a token ends a text."""
    return jnp.isin(token, jnp.asarray(settings.stop_ids, token.dtype))


def _repeats_ngram(
    context: Int[Array, " t"], length: Int[Array, ""], vocabulary: int, settings: GenerationConfig
) -> Bool[Array, " v"]:
    """Tokens that would close an n-gram which the context already holds."""
    n = settings.no_repeat_ngram_size
    assert n is not None
    starts = jnp.arange(max(len(context) - n + 1, 0))
    same = starts + n <= length  # only n-grams that lie in the context whole
    for i in range(n - 1):
        same &= context[starts + i] == context[length - (n - 1) + i]
    return _token_mask(context[starts + n - 1], same, vocabulary)


def _token_mask(
    tokens: Int[Array, " t"], chosen: Bool[Array, " t"], vocabulary: int
) -> Bool[Array, " v"]:
    return jnp.zeros(vocabulary, bool).at[tokens].max(chosen)
