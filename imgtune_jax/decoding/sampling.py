"""One token after another: the likeliest, or a draw."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.decoding.rules import apply_rules, is_stop
from imgtune_jax.decoding.settings import Decoding, Generated, Sample
from imgtune_jax.decoding.start import Start, last, new_tokens, write
from imgtune_jax.decoding.top_k import top_k
from imgtune_jax.types import PyTree


class _State(NamedTuple):
    count: Int[Array, ""]  # new tokens of a text that has not ended
    context: Int[Array, "b n t"]
    length: Int[Array, "b n"]
    logprob: Float[Array, "b n"]
    ended: Bool[Array, "b n"]
    own: PyTree


def draw(
    begin: Start, settings: Decoding, *, key: Array | None, limit: Int[Array, ""]
) -> Generated:
    """Texts of at most `limit` tokens, by `Sample` if there is a key, else by `Greedy`.

    Text j of row i is a function of (key, i, j) and of its own prompt and cache alone.
    """
    b, n, _ = begin.context.shape

    def go_on(s: _State) -> Bool[Array, ""]:
        """Whether a text has not ended."""
        return (s.count < limit) & ~jnp.all(s.ended)

    def body(s: _State) -> _State:
        """One token more for every text that has not ended."""
        logp, own = begin.step(s.own, last(s.context, s.length))
        scores = apply_rules(logp, s.context, s.length, s.count, settings)
        if isinstance(settings.method, Sample) and key is not None:
            token = _choose(scores, jax.random.fold_in(key, s.count), settings.method)
        else:
            token = jnp.argmax(scores, -1).astype(jnp.int32)
        gained = jnp.take_along_axis(logp, token[..., None], -1)[..., 0]
        return _State(
            count=s.count + 1,
            context=jnp.where(s.ended[..., None], s.context, write(s.context, s.length, token)),
            length=s.length + ~s.ended,
            logprob=s.logprob + jnp.where(s.ended, 0, gained),
            ended=s.ended | is_stop(token, settings),
            own=own,
        )

    first = _State(
        count=jnp.zeros((), jnp.int32),
        context=begin.context,
        length=jnp.repeat(begin.length[:, None], n, 1),
        logprob=jnp.zeros((b, n)),
        ended=jnp.zeros((b, n), bool),
        own=begin.own,
    )
    s = jax.lax.while_loop(go_on, body, first)
    tokens, mask = new_tokens(
        s.context, begin.length, s.length, room=settings.max_length, pad=settings.pad
    )
    return Generated(tokens, mask, s.logprob, s.logprob / mask.sum(-1))


def candidates(
    scores: Float[Array, "*b v"], method: Sample
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


def _choose(scores: Float[Array, "b n v"], key: Array, method: Sample) -> Int[Array, "b n"]:
    """A draw a text, each by its own key: neither other rows nor padding change it."""
    logits, tokens = candidates(scores, method)
    b, n, _ = scores.shape

    def one(i: Array, j: Array, logits: Float[Array, " m"]) -> Int[Array, ""]:
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, i), j), logits)

    over_texts = jax.vmap(one, in_axes=(None, 0, 0))
    index = jax.vmap(over_texts, in_axes=(0, None, 0))(jnp.arange(b), jnp.arange(n), logits)
    return jnp.take_along_axis(tokens, index[..., None], -1)[..., 0]
