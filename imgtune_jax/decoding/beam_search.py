"""Beam search (GNMT, 1609.08144; details as in Transformers) in one compiled loop."""

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
    """k sequences per row, in the order of their scores."""

    context: Int[Array, "b k t"]  # prompt and generated tokens
    length: Int[Array, "b k"]  # of prompt and generated tokens
    logprob: Float[Array, "b k"]  # under the model, without penalties
    score: Float[Array, "b k"]  # determines the order; -inf: an empty slot


class _BeamState(NamedTuple):
    count: Int[Array, ""]  # generated tokens of the alive hypotheses
    alive: _Hypotheses
    finished: _Hypotheses
    done: Bool[Array, " b"]  # no better hypothesis can be found
    cache: PyTree


def beam_search(
    prefilled: Prefilled, settings: GenerationConfig, *, limit: Int[Array, ""]
) -> GeneratedTokens:
    """Return the n best sequences of at most `limit` tokens, best first.

    `BeamSearch` defines their order. A stop token finishes a hypothesis only if it is among the
    `width` best continuations, as in Transformers. Hypotheses that are alive at the limit are
    ranked together with the finished ones.
    """
    method = settings.method
    assert isinstance(method, BeamSearch)

    def cond_fn(s: _BeamState) -> Bool[Array, ""]:
        return (s.count < limit) & ~jnp.all(s.done)

    def body_fn(s: _BeamState) -> _BeamState:
        return _beam_step(s, prefilled, settings, method, limit)

    s = jax.lax.while_loop(cond_fn, body_fn, _initial_state(prefilled, method.width))
    alive_score = s.alive.score / _penalty(s.count, method)
    alive = s.alive._replace(score=jnp.where(s.done[:, None], -jnp.inf, alive_score))
    best, _ = _top_n(_concat(s.finished, alive), method.n)
    exists = best.score > -jnp.inf
    tokens, mask = generated_tokens(
        best.context,
        prefilled.length,
        jnp.where(exists, best.length, 0),
        max_new_tokens=settings.max_new_tokens,
        pad=settings.pad_id,
    )
    return GeneratedTokens(tokens, mask, jnp.where(exists, best.logprob, -jnp.inf), best.score)


def _initial_state(prefilled: Prefilled, k: int) -> _BeamState:
    """Return one alive hypothesis per row, the prompt, and k - 1 empty slots."""
    b = len(prefilled.length)
    zeros = jnp.zeros((b, k))
    length = jnp.repeat(prefilled.length[:, None], k, 1)
    empty = _Hypotheses(prefilled.context, length, zeros, zeros - jnp.inf)
    return _BeamState(
        count=jnp.zeros((), jnp.int32),
        alive=empty._replace(score=empty.score.at[:, 0].set(0)),
        finished=empty,
        done=jnp.zeros(b, bool),
        cache=prefilled.cache,
    )


def _beam_step(
    s: _BeamState,
    prefilled: Prefilled,
    settings: GenerationConfig,
    method: BeamSearch,
    limit: Int[Array, ""],
) -> _BeamState:
    """Extend every alive hypothesis by one token."""
    k = method.width
    candidates, parent, cache = _expand(prefilled, s, settings)
    count = s.count + 1
    stops = is_stop(last_token(candidates.context, candidates.length), settings)
    is_finished = stops & (jnp.arange(stops.shape[1]) < k)[None]
    final_score = candidates.score / _penalty(count, method)
    newly_finished = candidates._replace(score=jnp.where(is_finished, final_score, -jnp.inf))
    finished, _ = _top_n(_concat(s.finished, newly_finished), k)
    finished = _select_rows(s.done, s.finished, finished)
    alive_score = jnp.where(stops, -jnp.inf, candidates.score)
    alive, selected = _top_n(candidates._replace(score=alive_score), k)
    best_length = limit if method.exhaustive and method.length_penalty > 0 else count
    # Not [:, 0]: with a second slice of its output, XLA:CPU turns top-k into a sort of the full
    # vocabulary.
    best_possible = candidates.score.max(1) / _penalty(best_length, method)
    return _BeamState(
        count=count,
        alive=alive,
        finished=finished,
        done=s.done | (finished.score[:, -1] >= best_possible),
        cache=_reorder_cache(cache, jnp.take_along_axis(parent, selected, 1)),
    )


def _expand(
    prefilled: Prefilled, s: _BeamState, settings: GenerationConfig
) -> tuple[_Hypotheses, Int[Array, "b m"], PyTree]:
    """Return (the m best continuations of the alive hypotheses, best first; parents; cache).

    m = k · (1 + number of stop tokens), so that at least k continuations do not stop. A parent is
    the index of the hypothesis that is continued.
    """
    logp, cache = prefilled.step(s.cache, last_token(s.alive.context, s.alive.length))
    b, k, v = logp.shape
    scores = process_scores(logp, s.alive.context, s.alive.length, s.count, settings)
    total = (s.alive.score[..., None] + scores).reshape(b, k * v)
    score, index = top_k(total, min(k * (1 + len(settings.stop_ids)), k * v))
    parent, token = index // v, index % v
    parents = _gather_rows(s.alive, parent)
    token_logp = jnp.take_along_axis(logp.reshape(b, k * v), index, 1)
    candidates = _Hypotheses(
        context=append_token(parents.context, parents.length, token),
        length=parents.length + 1,
        logprob=parents.logprob + token_logp,
        score=score,
    )
    return candidates, parent, cache


def _penalty(length: Int[Array, ""], method: BeamSearch) -> Float[Array, ""]:
    return length.astype(jnp.float32) ** method.length_penalty


def _top_n(hypotheses: _Hypotheses, n: int) -> tuple[_Hypotheses, Int[Array, "b n"]]:
    """Return the n hypotheses of each row with the highest scores, and their indices."""
    _, index = top_k(hypotheses.score, n)
    return _gather_rows(hypotheses, index), index


def _concat(a: _Hypotheses, b: _Hypotheses) -> _Hypotheses:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], 1), a, b)


def _select_rows(rows: Bool[Array, " b"], a: _Hypotheses, b: _Hypotheses) -> _Hypotheses:
    """Return `a` in the rows that are True, and `b` in the others."""

    def select(x: Array, y: Array) -> Array:
        return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    return jax.tree.map(select, a, b)


def _gather_rows(tree: PyTree, index: Int[Array, "b n"]) -> PyTree:
    """Index the second axis of [b k ...] arrays by row, without communication between devices."""
    return jax.tree.map(lambda x: jax.vmap(lambda rows, i: rows[i])(x, index), tree)


def _reorder_cache(cache: PyTree, index: Int[Array, "b k"]) -> PyTree:
    """Apply `_gather_rows` to a tree of [bk ...] arrays."""
    by_row = jax.tree.map(lambda x: x.reshape(*index.shape, *x.shape[1:]), cache)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), _gather_rows(by_row, index))
