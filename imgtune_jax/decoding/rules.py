"""Which tokens may come next: minimum length, repetition penalty, no n-gram twice."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.decoding.settings import Decoding


def apply_rules(
    logp: Float[Array, "b n v"],
    context: Int[Array, "b n t"],
    length: Int[Array, "b n"],
    count: Int[Array, ""],
    settings: Decoding,
) -> Float[Array, "b n v"]:
    """Scores of the next token: log p with the penalty, -inf where a rule forbids the token.

    `context` holds prompt and text so far in its first `length` entries; `count` of them are new.
    """

    def one(
        logp: Float[Array, " v"], context: Int[Array, " t"], length: Int[Array, ""]
    ) -> Float[Array, " v"]:
        if settings.repetition_penalty != 1:
            seen = _tokens(context, jnp.arange(len(context)) < length, len(logp))
            logp = jnp.where(seen, settings.repetition_penalty * logp, logp)
        if settings.no_repeat_ngram is not None:
            logp = jnp.where(_closes_ngram(context, length, len(logp), settings), -jnp.inf, logp)
        if settings.min_length:
            early = is_stop(jnp.arange(len(logp)), settings) & (count < settings.min_length)
            logp = jnp.where(early, -jnp.inf, logp)
        return logp

    return jax.vmap(jax.vmap(one))(logp, context, length)


def is_stop(token: Int[Array, "*s"], settings: Decoding) -> Bool[Array, "*s"]:
    """Whether a token ends a text."""
    return jnp.isin(token, jnp.asarray(settings.stop, token.dtype))


def _closes_ngram(
    context: Int[Array, " t"], length: Int[Array, ""], vocabulary: int, settings: Decoding
) -> Bool[Array, " v"]:
    """Tokens that would close an n-gram which the context already holds."""
    n = settings.no_repeat_ngram
    assert n is not None
    starts = jnp.arange(max(len(context) - n + 1, 0))
    same = starts + n <= length  # only n-grams that lie in the context whole
    for i in range(n - 1):
        same &= context[starts + i] == context[length - (n - 1) + i]
    return _tokens(context[starts + n - 1], same, vocabulary)


def _tokens(
    tokens: Int[Array, " t"], chosen: Bool[Array, " t"], vocabulary: int
) -> Bool[Array, " v"]:
    return jnp.zeros(vocabulary, bool).at[tokens].max(chosen)
