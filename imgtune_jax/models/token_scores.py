"""Scores of tokens under a vocabulary, without ever holding logits [b l v] as a whole."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from imgtune_jax.models import layers
from imgtune_jax.types import TokenScores

LOGITS_AXES = ("batch", "length", "vocab")  # logical axes


def token_scores(
    hidden: Float[Array, "b t d"],
    kernel: Float[Array, "d v"],
    target: Int[Array, "b t"],
    *,
    chunk: int,
    dtype: layers.Dtype = jnp.float32,
    constrain: layers.Constrain = layers.no_constraint,
) -> TokenScores:
    """What a loss needs of `hidden @ kernel`, `chunk` positions of all rows at a time.

    Forward and backward hold logits [b chunk v] only: the backward pass computes them again. They
    and all sums are float32.
    """

    def scores(kernel: Array, hidden: Array, target: Array) -> TokenScores:
        logits = constrain(layers.dense(hidden, kernel, dtype=dtype), LOGITS_AXES)
        # A sum over a comparison: a gather along a sharded vocabulary would fetch all of it.
        here = jnp.arange(logits.shape[-1])[None, None] == target[..., None]
        of_target = jnp.where(here, logits, 0.0).sum(-1)
        total = jax.nn.logsumexp(logits, axis=-1)
        correct = (of_target >= jax.lax.stop_gradient(logits).max(-1)) * 1.0
        return TokenScores(of_target - total, total, logits.mean(-1) - total, correct)

    length = target.shape[1]
    if length <= chunk:
        return scores(kernel, hidden, target)
    count = -(-length // chunk)
    fill = count * chunk - length

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(len(x), count, chunk, *x.shape[2:]).swapaxes(0, 1)

    def joined(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :length]

    # Inside a scan nothing is merged across iterations, so no barrier is needed.
    one = functools.partial(jax.checkpoint(scores, prevent_cse=False), kernel)
    _, parts = jax.lax.scan(lambda _, part: (None, one(*part)), None, (cut(hidden), cut(target)))
    return jax.tree.map(joined, parts)
