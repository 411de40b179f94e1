"""Beam search (as in GNMT, 1609.08144, and Transformers), whole in one compiled loop."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.decoding.logits_processors import is_stop, process_scores
from imgtune_jax.decoding.prefill import Prefilled, append_token, generated_tokens, last_token
from imgtune_jax.decoding.settings import BeamSearch, GeneratedTokens, GenerationConfig
from imgtune_jax.decoding.top_k import top_k
from imgtune_jax.types import PyTree


class _Hypotheses(NamedTuple):
    context: Int[Array, "b k t"]
    length: Int[Array, "b k"]
    logprob: Float[Array, "b k"]  # the model's own
    score: Float[Array, "b k"]  # what they are ordered by; -inf: no text


class _BeamState(NamedTuple):
    count: Int[Array, ""]  # new tokens of the live texts
    alive: _Hypotheses
    finished: _Hypotheses
    done: Bool[Array, " b"]
    own: PyTree


def beam_search(
    begin: Prefilled, settings: GenerationConfig, *, limit: Int[Array, ""]
) -> GeneratedTokens:
    """The n best texts of at most `limit` tokens, best first; see `Beam` for the order.

    A stop token ends a hypothesis only among the `width` best continuations, as in Transformers.
    Hypotheses that live at the limit are ranked with the finished ones.
    """
    method = settings.method
    assert isinstance(method, BeamSearch)
    k = method.width

    def cond_fn(s: _BeamState) -> Bool[Array, ""]:
        """Whether a row could still find a better text."""
        return (s.count < limit) & ~jnp.all(s.done)

    def body_fn(s: _BeamState) -> _BeamState:
        """One token more for every live text."""
        found, parent, own = _expand(begin, s, settings)
        count = s.count + 1
        stops = is_stop(last_token(found.context, found.length), settings)
        ends = stops & (jnp.arange(stops.shape[1]) < k)[None]
        penalised = found.score / _penalty(count, method)
        finished = found._replace(score=jnp.where(ends, penalised, -jnp.inf))
        ended, _ = _top_n(_concat(s.finished, finished), k)
        ended = _select_rows(s.done, s.finished, ended)
        live, kept = _top_n(found._replace(score=jnp.where(stops, -jnp.inf, found.score)), k)
        longest = limit if method.exhaustive and method.length_penalty > 0 else count
        # Not [:, 0]: sliced twice, XLA:CPU's top-k becomes a sort of the whole vocabulary.
        could_be = found.score.max(1) / _penalty(longest, method)
        return _BeamState(
            count=count,
            alive=live,
            finished=ended,
            done=s.done | (ended.score[:, -1] >= could_be),
            own=_reorder_cache(own, jnp.take_along_axis(parent, kept, 1)),
        )

    s = jax.lax.while_loop(cond_fn, body_fn, _initial_state(begin, k))
    at_limit = s.alive.score / _penalty(s.count, method)
    at_limit = s.alive._replace(score=jnp.where(s.done[:, None], -jnp.inf, at_limit))
    best, _ = _top_n(_concat(s.finished, at_limit), method.n)
    exists = best.score > -jnp.inf
    length = jnp.where(exists, best.length, 0)
    tokens, mask = generated_tokens(
        best.context,
        begin.length,
        length,
        max_new_tokens=settings.max_new_tokens,
        pad=settings.pad_id,
    )
    return GeneratedTokens(tokens, mask, jnp.where(exists, best.logprob, -jnp.inf), best.score)


def _initial_state(begin: Prefilled, k: int) -> _BeamState:
    """One live text a row, the prompt; the other places are empty."""
    b = len(begin.length)
    zeros = jnp.zeros((b, k))
    length = jnp.repeat(begin.length[:, None], k, 1)
    nothing = _Hypotheses(begin.context, length, zeros, zeros - jnp.inf)
    return _BeamState(
        count=jnp.zeros((), jnp.int32),
        alive=nothing._replace(score=nothing.score.at[:, 0].set(0)),
        finished=nothing,
        done=jnp.zeros(b, bool),
        own=begin.cache,
    )


def _expand(
    begin: Prefilled, s: _BeamState, settings: GenerationConfig
) -> tuple[_Hypotheses, Int[Array, "b m"], list]:
    """The m best continuations of all live texts, best first, and which text each continues.

    m = k (1 + stop tokens): so many that k of them go on.
    """
    logp, own = begin.step(s.own, last_token(s.alive.context, s.alive.length))
    b, k, v = logp.shape
    scores = process_scores(logp, s.alive.context, s.alive.length, s.count, settings)
    total = (s.alive.score[..., None] + scores).reshape(b, k * v)
    score, index = top_k(total, min(k * (1 + len(settings.stop_ids)), k * v))
    parent, token = index // v, index % v
    texts = _gather_rows(s.alive, parent)
    gained = jnp.take_along_axis(logp.reshape(b, k * v), index, 1)
    found = _Hypotheses(
        context=append_token(texts.context, texts.length, token),
        length=texts.length + 1,
        logprob=texts.logprob + gained,
        score=score,
    )
    return found, parent, own


def _penalty(count: Int[Array, ""], method: BeamSearch) -> Float[Array, ""]:
    return count.astype(jnp.float32) ** method.length_penalty


def _top_n(texts: _Hypotheses, n: int) -> tuple[_Hypotheses, Int[Array, "b n"]]:
    _, index = top_k(texts.score, n)
    return _gather_rows(texts, index), index


def _concat(a: _Hypotheses, b: _Hypotheses) -> _Hypotheses:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], 1), a, b)


def _select_rows(rows: Bool[Array, " b"], a: _Hypotheses, b: _Hypotheses) -> _Hypotheses:
    def choose(x: Array, y: Array) -> Array:
        return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    return jax.tree.map(choose, a, b)


def _gather_rows(tree: PyTree, index: Int[Array, "b n"]) -> PyTree:
    """Rows of the second axis, within each of the first: no device needs another's."""
    return jax.tree.map(lambda x: jax.vmap(lambda rows, i: rows[i])(x, index), tree)


def _reorder_cache(own: PyTree, index: Int[Array, "b k"]) -> PyTree:
    """`_rows` of a tree [bk ...]."""
    texts = jax.tree.map(lambda x: x.reshape(*index.shape, *x.shape[1:]), own)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), _gather_rows(texts, index))
