"""Greedy decoding and sampling, one token after another in one compiled loop."""

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
    count: Int[Array, ""]  # generated tokens of a sequence that is not finished
    context: Int[Array, "b n t"]  # prompt and generated tokens
    length: Int[Array, "b n"]  # of prompt and generated tokens
    logprob: Float[Array, "b n"]
    finished: Bool[Array, "b n"]
    cache: PyTree


def sample(
    prefilled: Prefilled, settings: GenerationConfig, *, key: Array | None, limit: Int[Array, ""]
) -> GeneratedTokens:
    """Return sequences of at most `limit` tokens: `Sampling` with a key, `Greedy` without.

    Sequence j of row i depends only on (key, i, j), the row's prompt and its cache.
    """
    b, n, _ = prefilled.context.shape

    def cond_fn(s: _SamplingState) -> Bool[Array, ""]:
        return (s.count < limit) & ~jnp.all(s.finished)

    def body_fn(s: _SamplingState) -> _SamplingState:
        """Extend every unfinished sequence by one token."""
        logp, cache = prefilled.step(s.cache, last_token(s.context, s.length))
        scores = process_scores(logp, s.context, s.length, s.count, settings)
        if isinstance(settings.method, Sampling) and key is not None:
            token = _sample_token(scores, jax.random.fold_in(key, s.count), settings.method)
        else:
            token = jnp.argmax(scores, -1).astype(jnp.int32)
        token_logp = jnp.take_along_axis(logp, token[..., None], -1)[..., 0]
        extended = append_token(s.context, s.length, token)
        return _SamplingState(
            count=s.count + 1,
            context=jnp.where(s.finished[..., None], s.context, extended),
            length=s.length + ~s.finished,
            logprob=s.logprob + jnp.where(s.finished, 0, token_logp),
            finished=s.finished | is_stop(token, settings),
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
    s = jax.lax.while_loop(cond_fn, body_fn, initial)
    tokens, mask = generated_tokens(
        s.context,
        prefilled.length,
        s.length,
        max_new_tokens=settings.max_new_tokens,
        pad=settings.pad_id,
    )
    return GeneratedTokens(tokens, mask, s.logprob, s.logprob / mask.sum(-1))


def filter_logits(
    scores: Float[Array, "*b v"], method: Sampling
) -> tuple[Float[Array, "*b m"], Int[Array, "*b m"]]:
    """Return (logits, their token ids) after temperature, top-k and top-p.

    The logits of excluded tokens are -inf. With `top_k` or `top_p`, tokens are sorted by
    decreasing logit, and m is at most `top_k`.
    """
    logits = scores / method.temperature
    v = scores.shape[-1]
    if method.top_k is None and method.top_p == 1:
        return logits, jnp.broadcast_to(jnp.arange(v, dtype=jnp.int32), logits.shape)
    logits, tokens = top_k(logits, min(method.top_k or v, v))
    probs = jax.nn.softmax(logits)
    likelier = jnp.cumsum(probs, -1) - probs  # total of the likelier tokens; 0 for the first
    return jnp.where(likelier < method.top_p, logits, -jnp.inf), tokens


def _sample_token(scores: Float[Array, "b n v"], key: Array, method: Sampling) -> Int[Array, "b n"]:
    """Sample one token per sequence; the key of sequence j of row i is folded from i and j."""
    logits, tokens = filter_logits(scores, method)
    b, n, _ = scores.shape

    def sample_index(i: Array, j: Array, logits: Float[Array, " m"]) -> Int[Array, ""]:
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, i), j), logits)

    over_sequences = jax.vmap(sample_index, in_axes=(None, 0, 0))
    over_rows = jax.vmap(over_sequences, in_axes=(0, None, 0))
    index = over_rows(jnp.arange(b), jnp.arange(n), logits)
    return jnp.take_along_axis(tokens, index[..., None], -1)[..., 0]
