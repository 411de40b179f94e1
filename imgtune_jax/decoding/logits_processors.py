"""Changes to the log probabilities of the next token: minimum length, repetition penalty, n-grams.

Axis letters: b rows, n sequences per row, t positions of the context (prompt and new tokens),
v vocabulary.
"""

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
    """Return `logp` with the repetition penalty applied, and with -inf for forbidden tokens.

    The first `length` entries of `context` are the prompt tokens and then the generated tokens, of
    which there are `count`.
    """

    def process_one(
        logp: Float[Array, " v"], context: Int[Array, " t"], length: Int[Array, ""]
    ) -> Float[Array, " v"]:
        if settings.repetition_penalty != 1:
            repeated = _token_mask(context, jnp.arange(len(context)) < length, len(logp))
            logp = jnp.where(repeated, settings.repetition_penalty * logp, logp)
        if settings.no_repeat_ngram_size is not None:
            logp = jnp.where(_repeats_ngram(context, length, len(logp), settings), -jnp.inf, logp)
        if settings.min_new_tokens:
            too_early = is_stop(jnp.arange(len(logp)), settings) & (count < settings.min_new_tokens)
            logp = jnp.where(too_early, -jnp.inf, logp)
        return logp

    return jax.vmap(jax.vmap(process_one))(logp, context, length)


def is_stop(token: Int[Array, "*s"], settings: GenerationConfig) -> Bool[Array, "*s"]:
    """Return whether a token finishes its sequence."""
    return jnp.isin(token, jnp.asarray(settings.stop_ids, token.dtype))


def _repeats_ngram(
    context: Int[Array, " t"], length: Int[Array, ""], vocab_size: int, settings: GenerationConfig
) -> Bool[Array, " v"]:
    """Return the mask of the tokens that would repeat an n-gram of the context."""
    n = settings.no_repeat_ngram_size
    assert n is not None
    starts = jnp.arange(max(len(context) - n + 1, 0))
    # Compare the first n - 1 tokens of every n-gram with the last n - 1 tokens of the context.
    matches = starts + n <= length  # False for n-grams beyond the first `length` tokens
    for i in range(n - 1):
        matches &= context[starts + i] == context[length - (n - 1) + i]
    return _token_mask(context[starts + n - 1], matches, vocab_size)


def _token_mask(
    tokens: Int[Array, " t"], selected: Bool[Array, " t"], vocab_size: int
) -> Bool[Array, " v"]:
    """Return a mask over the vocabulary, True for the tokens where `selected` is True."""
    return jnp.zeros(vocab_size, bool).at[tokens].max(selected)
