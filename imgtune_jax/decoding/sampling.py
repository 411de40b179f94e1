"""One token after another: the likeliest, or a draw."""

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
    count: Int[Array, ""]  # new tokens of a text that has not ended
    context: Int[Array, "b n t"]
    length: Int[Array, "b n"]
    logprob: Float[Array, "b n"]
    finished: Bool[Array, "b n"]
    own: PyTree


def sample(
    begin: Prefilled, settings: GenerationConfig, *, key: Array | None, limit: Int[Array, ""]
) -> GeneratedTokens:
    """Texts of at most `limit` tokens, by `Sample` if there is a key, else by `Greedy`.

    Text j of row i is a function of (key, i, j) and of its own prompt and cache alone.
    """
    b, n, _ = begin.context.shape

    def cond_fn(s: _SamplingState) -> Bool[Array, ""]:
        """Whether a text has not ended."""
        return (s.count < limit) & ~jnp.all(s.finished)

    def body_fn(s: _SamplingState) -> _SamplingState:
        """One token more for every text that has not ended."""
        logp, own = begin.step(s.own, last_token(s.context, s.length))
        scores = process_scores(logp, s.context, s.length, s.count, settings)
        if isinstance(settings.method, Sampling) and key is not None:
            token = _sample_token(scores, jax.random.fold_in(key, s.count), settings.method)
        else:
            token = jnp.argmax(scores, -1).astype(jnp.int32)
        gained = jnp.take_along_axis(logp, token[..., None], -1)[..., 0]
        return _SamplingState(
            count=s.count + 1,
            context=jnp.where(
                s.finished[..., None], s.context, append_token(s.context, s.length, token)
            ),
            length=s.length + ~s.finished,
            logprob=s.logprob + jnp.where(s.finished, 0, gained),
            finished=s.finished | is_stop(token, settings),
            own=own,
        )

    first = _SamplingState(
        count=jnp.zeros((), jnp.int32),
        context=begin.context,
        length=jnp.repeat(begin.length[:, None], n, 1),
        logprob=jnp.zeros((b, n)),
        finished=jnp.zeros((b, n), bool),
        own=begin.cache,
    )
    s = jax.lax.while_loop(cond_fn, body_fn, first)
    tokens, mask = generated_tokens(
        s.context,
        begin.length,
        s.length,
        max_new_tokens=settings.max_new_tokens,
        pad=settings.pad_id,
    )
    return GeneratedTokens(tokens, mask, s.logprob, s.logprob / mask.sum(-1))


def filter_logits(
    scores: Float[Array, "*b v"], method: Sampling
) -> tuple[Float[Array, "*b m"], Int[Array, "*b m"]]:
    """Logits of what may be drawn (-inf: it may not), and the tokens they are of."""
    logits = scores / method.temperature
    v = scores.shape[-1]
    if method.top_k is None and method.top_p == 1:
        return logits, jnp.broadcast_to(jnp.arange(v, dtype=jnp.int32), logits.shape)
    logits, tokens = top_k(logits, min(method.top_k or v, v))
    p = jax.nn.softmax(logits)
    likelier = jnp.cumsum(p, -1) - p  # the first token stays: nothing is likelier
    return jnp.where(likelier < method.top_p, logits, -jnp.inf), tokens


def _sample_token(scores: Float[Array, "b n v"], key: Array, method: Sampling) -> Int[Array, "b n"]:
    """A draw a text, each by its own key: neither other rows nor padding change it."""
    logits, tokens = filter_logits(scores, method)
    b, n, _ = scores.shape

    def one(i: Array, j: Array, logits: Float[Array, " m"]) -> Int[Array, ""]:
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, i), j), logits)

    over_texts = jax.vmap(one, in_axes=(None, 0, 0))
    index = jax.vmap(over_texts, in_axes=(0, None, 0))(jnp.arange(b), jnp.arange(n), logits)
    return jnp.take_along_axis(tokens, index[..., None], -1)[..., 0]
