"""Beam search (GNMT, 1609.08144; details as in Transformers) in one compiled loop.

Axis letters: b rows, k hypotheses per row, m candidate continuations, n results per row,
t positions of the context (prompt and new tokens), v vocabulary.
"""

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
    """k sequences per row, sorted by decreasing score."""

    context: Int[Array, "b k t"]  # prompt and generated tokens
    length: Int[Array, "b k"]  # number of prompt and generated tokens
    logprob: Float[Array, "b k"]  # log p under the model, without penalties
    score: Float[Array, "b k"]  # -inf: an empty slot


class _BeamState(NamedTuple):
    """State of the search loop."""

    count: Int[Array, ""]  # number of generated tokens of every alive hypothesis
    alive: _Hypotheses
    finished: _Hypotheses
    done: Bool[Array, " b"]  # the search of the row has ended
    cache: PyTree


def beam_search(
    prefilled: Prefilled, settings: GenerationConfig, *, limit: Int[Array, ""]
) -> GeneratedTokens:
    """Return the n best sequences of at most `limit` new tokens, best first.

    The docstring of `settings.BeamSearch` states how sequences are ranked and when a row ends. As
    in Transformers, a stop token finishes a hypothesis only if it is among the `width` best
    continuations. Hypotheses that are alive at the limit are ranked together with the finished
    ones.
    """
    method = settings.method
    assert isinstance(method, BeamSearch)

    def cond_fn(state: _BeamState) -> Bool[Array, ""]:
        return (state.count < limit) & ~jnp.all(state.done)

    def body_fn(state: _BeamState) -> _BeamState:
        return _beam_step(state, prefilled, settings, method, limit)

    state = jax.lax.while_loop(cond_fn, body_fn, _initial_state(prefilled, method.width))
    alive_score = state.alive.score / _penalty(state.count, method)
    alive = state.alive._replace(score=jnp.where(state.done[:, None], -jnp.inf, alive_score))
    best, _ = _top_n(_concat(state.finished, alive), method.n)
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
    """Return a state with one alive hypothesis per row (the prompt) and k - 1 empty slots."""
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
    state: _BeamState,
    prefilled: Prefilled,
    settings: GenerationConfig,
    method: BeamSearch,
    limit: Int[Array, ""],
) -> _BeamState:
    """Extend every alive hypothesis by one token."""
    k = method.width
    candidates, parent_index, cache = _expand(prefilled, state, settings)
    count = state.count + 1
    stops = is_stop(last_token(candidates.context, candidates.length), settings)
    is_finished = stops & (jnp.arange(stops.shape[1]) < k)[None]
    final_score = candidates.score / _penalty(count, method)
    newly_finished = candidates._replace(score=jnp.where(is_finished, final_score, -jnp.inf))
    finished, _ = _top_n(_concat(state.finished, newly_finished), k)
    finished = _select_rows(state.done, state.finished, finished)
    alive_score = jnp.where(stops, -jnp.inf, candidates.score)
    alive, selected = _top_n(candidates._replace(score=alive_score), k)
    # Length at which an alive hypothesis could have its best score. Log p is negative, so with a
    # positive penalty that is the limit. Without `exhaustive`, only the current length counts.
    best_length = limit if method.exhaustive and method.length_penalty > 0 else count
    # max(1) and not [:, 0]: a second slice of the output of top-k would make XLA:CPU sort the full
    # vocabulary.
    best_possible = candidates.score.max(1) / _penalty(best_length, method)
    return _BeamState(
        count=count,
        alive=alive,
        finished=finished,
        done=state.done | (finished.score[:, -1] >= best_possible),
        cache=_reorder_cache(cache, jnp.take_along_axis(parent_index, selected, 1)),
    )


def _expand(
    prefilled: Prefilled, state: _BeamState, settings: GenerationConfig
) -> tuple[_Hypotheses, Int[Array, "b m"], PyTree]:
    """Return (candidates, parent_index, cache).

    The candidates are the m best continuations of the alive hypotheses by one token, best first.
    `parent_index` is the index of the hypothesis that a candidate continues. m is
    k · (1 + number of stop tokens), so that at least k candidates do not end with a stop token.
    """
    logp, cache = prefilled.step(state.cache, last_token(state.alive.context, state.alive.length))
    b, k, v = logp.shape
    scores = process_scores(logp, state.alive.context, state.alive.length, state.count, settings)
    total = (state.alive.score[..., None] + scores).reshape(b, k * v)
    score, index = top_k(total, min(k * (1 + len(settings.stop_ids)), k * v))
    parent_index, token = index // v, index % v
    parents = _gather_rows(state.alive, parent_index)
    token_logp = jnp.take_along_axis(logp.reshape(b, k * v), index, 1)
    candidates = _Hypotheses(
        context=append_token(parents.context, parents.length, token),
        length=parents.length + 1,
        logprob=parents.logprob + token_logp,
        score=score,
    )
    return candidates, parent_index, cache


def _penalty(length: Int[Array, ""], method: BeamSearch) -> Float[Array, ""]:
    """Return the divisor of the log probability of a hypothesis."""
    return length.astype(jnp.float32) ** method.length_penalty


def _top_n(hypotheses: _Hypotheses, n: int) -> tuple[_Hypotheses, Int[Array, "b n"]]:
    """Return the n hypotheses of each row with the highest scores, and their indices."""
    _, index = top_k(hypotheses.score, n)
    return _gather_rows(hypotheses, index), index


def _concat(a: _Hypotheses, b: _Hypotheses) -> _Hypotheses:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], 1), a, b)


def _select_rows(rows: Bool[Array, " b"], a: _Hypotheses, b: _Hypotheses) -> _Hypotheses:
    """Return the hypotheses of `a` where `rows` is True, and those of `b` elsewhere."""

    def select(x: Array, y: Array) -> Array:
        return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    return jax.tree.map(select, a, b)


def _gather_rows(tree: PyTree, index: Int[Array, "b n"]) -> PyTree:
    """Return x[i, index[i]] for every row i of [b k ...] arrays x. Devices do not communicate."""
    return jax.tree.map(lambda x: jax.vmap(lambda rows, i: rows[i])(x, index), tree)


def _reorder_cache(cache: PyTree, index: Int[Array, "b k"]) -> PyTree:
    """Apply `_gather_rows` to a cache, whose arrays are [b·k ...]."""
    by_row = jax.tree.map(lambda x: x.reshape(*index.shape, *x.shape[1:]), cache)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), _gather_rows(by_row, index))
