"""Greedy decoding and sampling, one token after another in one compiled loop.

Axis letters: b rows, n sequences per row, t positions of the context (prompt and new tokens),
v vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.decoding.logits_processors import is_stop, process_scores
from imgtune_jax.decoding.prefill import Prefilled, append_token, generated_tokens, last_token
from imgtune_jax.decoding.settings import GeneratedTokens, GenerationConfig, Sampling
from imgtune_jax.decoding.top_k import top_k
from imgtune_jax.types import PyTree


class _SamplingState(NamedTuple):
    """State of the generation loop."""

    count: Int[Array, ""]  # number of generated tokens of every unfinished sequence
    context: Int[Array, "b n t"]  # prompt and generated tokens
    length: Int[Array, "b n"]  # number of prompt and generated tokens
    logprob: Float[Array, "b n"]
    finished: Bool[Array, "b n"]
    cache: PyTree


def sample(
    prefilled: Prefilled, settings: GenerationConfig, *, key: Array | None, limit: Int[Array, ""]
) -> GeneratedTokens:
    """Generate at most `limit` tokens per sequence: `Sampling` with a key, `Greedy` without one.

    Sequence j of row i depends only on (key, i, j), the row's prompt and its cache.
    """
    b, n, _ = prefilled.context.shape

    def cond_fn(state: _SamplingState) -> Bool[Array, ""]:
        return (state.count < limit) & ~jnp.all(state.finished)

    def body_fn(state: _SamplingState) -> _SamplingState:
        """Extend every unfinished sequence by one token."""
        logp, cache = prefilled.step(state.cache, last_token(state.context, state.length))
        scores = process_scores(logp, state.context, state.length, state.count, settings)
        if isinstance(settings.method, Sampling) and key is not None:
            token = _sample_token(scores, jax.random.fold_in(key, state.count), settings.method)
        else:
            token = jnp.argmax(scores, -1).astype(jnp.int32)
        token_logp = jnp.take_along_axis(logp, token[..., None], -1)[..., 0]
        extended = append_token(state.context, state.length, token)
        return _SamplingState(
            count=state.count + 1,
            context=jnp.where(state.finished[..., None], state.context, extended),
            length=state.length + ~state.finished,
            logprob=state.logprob + jnp.where(state.finished, 0, token_logp),
            finished=state.finished | is_stop(token, settings),
            cache=cache,
        )

    initial = _SamplingState(
        count=jnp.zeros((), jnp.int32),
        context=prefilled.context,
        length=jnp.repeat(prefilled.length[:, None], n, 1),
        logprob=jnp.zeros((b, n)),
        finished=jnp.zeros((b, n), bool),
        cache=prefilled.cache,
    )
    state = jax.lax.while_loop(cond_fn, body_fn, initial)
    tokens, mask = generated_tokens(
        state.context,
        prefilled.length,
        state.length,
        max_new_tokens=settings.max_new_tokens,
        pad=settings.pad_id,
    )
    return GeneratedTokens(tokens, mask, state.logprob, state.logprob / mask.sum(-1))


def filter_logits(
    scores: Float[Array, "*b v"], method: Sampling
) -> tuple[Float[Array, "*b m"], Int[Array, "*b m"]]:
    """Apply temperature, top-k and top-p; return (logits, their token ids).

    The logits of excluded tokens are -inf. With `top_k` or `top_p`, tokens are sorted by
    decreasing logit, and m is at most `top_k`.
    """
    logits = scores / method.temperature
    v = scores.shape[-1]
    if method.top_k is None and method.top_p == 1:
        return logits, jnp.broadcast_to(jnp.arange(v, dtype=jnp.int32), logits.shape)
    logits, tokens = top_k(logits, min(method.top_k or v, v))
    probs = jax.nn.softmax(logits)
    likelier_probs = jnp.cumsum(probs, -1) - probs  # summed over the likelier tokens
    return jnp.where(likelier_probs < method.top_p, logits, -jnp.inf), tokens


def _sample_token(scores: Float[Array, "b n v"], key: Array, method: Sampling) -> Int[Array, "b n"]:
    """Sample one token per sequence. `key` is folded with i and j for sequence j of row i."""
    logits, tokens = filter_logits(scores, method)
    b, n, _ = scores.shape

    def sample_index(i: Array, j: Array, logits: Float[Array, " m"]) -> Int[Array, ""]:
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, i), j), logits)

    over_sequences = jax.vmap(sample_index, in_axes=(None, 0, 0))
    over_rows = jax.vmap(over_sequences, in_axes=(0, None, 0))
    index = over_rows(jnp.arange(b), jnp.arange(n), logits)
    return jnp.take_along_axis(tokens, index[..., None], -1)[..., 0]
