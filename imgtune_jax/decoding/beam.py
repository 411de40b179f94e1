"""Beam search (as in GNMT, 1609.08144, and Transformers), whole in one compiled loop."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.decoding.rules import apply_rules, is_stop
from imgtune_jax.decoding.settings import Beam, Decoding, Generated
from imgtune_jax.decoding.start import Start, last, new_tokens, write
from imgtune_jax.decoding.top_k import top_k
from imgtune_jax.types import PyTree


class _Texts(NamedTuple):
    context: Int[Array, "b k t"]
    length: Int[Array, "b k"]
    logprob: Float[Array, "b k"]  # the model's own
    score: Float[Array, "b k"]  # what they are ordered by; -inf: no text


class _State(NamedTuple):
    count: Int[Array, ""]  # new tokens of the live texts
    live: _Texts
    ended: _Texts
    done: Bool[Array, " b"]
    own: PyTree


def search(begin: Start, settings: Decoding, *, limit: Int[Array, ""]) -> Generated:
    """The n best texts of at most `limit` tokens, best first; see `Beam` for the order.

    A stop token ends a hypothesis only among the `width` best continuations, as in Transformers.
    Hypotheses that live at the limit are ranked with the finished ones.
    """
    method = settings.method
    assert isinstance(method, Beam)
    k = method.width

    def go_on(s: _State) -> Bool[Array, ""]:
        """Whether a row could still find a better text."""
        return (s.count < limit) & ~jnp.all(s.done)

    def body(s: _State) -> _State:
        """One token more for every live text."""
        found, parent, own = _extend(begin, s, settings)
        count = s.count + 1
        stops = is_stop(last(found.context, found.length), settings)
        ends = stops & (jnp.arange(stops.shape[1]) < k)[None]
        penalised = found.score / _penalty(count, method)
        finished = found._replace(score=jnp.where(ends, penalised, -jnp.inf))
        ended, _ = _best(_join(s.ended, finished), k)
        ended = _where(s.done, s.ended, ended)
        live, kept = _best(found._replace(score=jnp.where(stops, -jnp.inf, found.score)), k)
        longest = limit if method.exhaustive and method.length_penalty > 0 else count
        # Not [:, 0]: sliced twice, XLA:CPU's top-k becomes a sort of the whole vocabulary.
        could_be = found.score.max(1) / _penalty(longest, method)
        return _State(
            count=count,
            live=live,
            ended=ended,
            done=s.done | (ended.score[:, -1] >= could_be),
            own=_moved(own, jnp.take_along_axis(parent, kept, 1)),
        )

    s = jax.lax.while_loop(go_on, body, _first(begin, k))
    at_limit = s.live.score / _penalty(s.count, method)
    at_limit = s.live._replace(score=jnp.where(s.done[:, None], -jnp.inf, at_limit))
    best, _ = _best(_join(s.ended, at_limit), method.n)
    exists = best.score > -jnp.inf
    length = jnp.where(exists, best.length, 0)
    tokens, mask = new_tokens(
        best.context, begin.length, length, room=settings.max_length, pad=settings.pad
    )
    return Generated(tokens, mask, jnp.where(exists, best.logprob, -jnp.inf), best.score)


def _first(begin: Start, k: int) -> _State:
    """One live text a row, the prompt; the other places are empty."""
    b = len(begin.length)
    zeros = jnp.zeros((b, k))
    length = jnp.repeat(begin.length[:, None], k, 1)
    nothing = _Texts(begin.context, length, zeros, zeros - jnp.inf)
    return _State(
        count=jnp.zeros((), jnp.int32),
        live=nothing._replace(score=nothing.score.at[:, 0].set(0)),
        ended=nothing,
        done=jnp.zeros(b, bool),
        own=begin.own,
    )


def _extend(begin: Start, s: _State, settings: Decoding) -> tuple[_Texts, Int[Array, "b m"], list]:
    """The m best continuations of all live texts, best first, and which text each continues.

    m = k (1 + stop tokens): so many that k of them go on.
    """
    logp, own = begin.step(s.own, last(s.live.context, s.live.length))
    b, k, v = logp.shape
    scores = apply_rules(logp, s.live.context, s.live.length, s.count, settings)
    total = (s.live.score[..., None] + scores).reshape(b, k * v)
    score, index = top_k(total, min(k * (1 + len(settings.stop)), k * v))
    parent, token = index // v, index % v
    texts = _rows(s.live, parent)
    gained = jnp.take_along_axis(logp.reshape(b, k * v), index, 1)
    found = _Texts(
        context=write(texts.context, texts.length, token),
        length=texts.length + 1,
        logprob=texts.logprob + gained,
        score=score,
    )
    return found, parent, own


def _penalty(count: Int[Array, ""], method: Beam) -> Float[Array, ""]:
    return count.astype(jnp.float32) ** method.length_penalty


def _best(texts: _Texts, n: int) -> tuple[_Texts, Int[Array, "b n"]]:
    _, index = top_k(texts.score, n)
    return _rows(texts, index), index


def _join(a: _Texts, b: _Texts) -> _Texts:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], 1), a, b)


def _where(rows: Bool[Array, " b"], a: _Texts, b: _Texts) -> _Texts:
    def choose(x: Array, y: Array) -> Array:
        return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    return jax.tree.map(choose, a, b)


def _rows(tree: PyTree, index: Int[Array, "b n"]) -> PyTree:
    """Rows of the second axis, within each of the first: no device needs another's."""
    return jax.tree.map(lambda x: jax.vmap(lambda rows, i: rows[i])(x, index), tree)


def _moved(own: PyTree, index: Int[Array, "b k"]) -> PyTree:
    """`_rows` of a tree [bk ...]."""
    texts = jax.tree.map(lambda x: x.reshape(*index.shape, *x.shape[1:]), own)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), _rows(texts, index))
