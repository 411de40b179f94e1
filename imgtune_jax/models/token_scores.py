"""Scores of tokens under a decoder, without holding the logits of all positions in memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from imgtune_jax.models import layers
from imgtune_jax.types import Constrain, TokenScores, no_constraint

LOGITS_AXES = ("batch", "length", "vocab")  # logical axes of the logits


def token_scores(
    hidden: Float[Array, "b t d"],
    kernel: Float[Array, "d v"],
    target: Int[Array, "b t"],
    *,
    bias: Float[Array, " v"] | None = None,
    chunk: int,
    dtype: layers.Dtype = jnp.float32,
    constrain: Constrain = no_constraint,
    hand_written_gradients: bool = True,
) -> TokenScores:
    """Score `target` under the logits `hidden @ kernel + bias`, for `chunk` positions at a time.

    The log probability of a target outside the vocabulary is NaN. Only the logits [b chunk v] of
    one chunk are in memory at once; the backward pass recomputes them. Logits and all sums are
    float32. `hand_written_gradients` is as in `layers`.
    """

    def score(kernel: Array, bias: Array | None, hidden: Array, target: Array) -> TokenScores:
        logits = layers.dense(
            hidden, kernel, bias, dtype=dtype, hand_written_gradients=hand_written_gradients
        )
        logits = constrain(logits, LOGITS_AXES)
        # Compare and sum, since a gather along a sharded vocabulary would gather all logits.
        is_target = jnp.arange(logits.shape[-1])[None, None] == target[..., None]
        target_logit = jnp.where(is_target, logits, 0.0).sum(-1)
        in_vocabulary = (target >= 0) & (target < logits.shape[-1])
        target_logit = jnp.where(in_vocabulary, target_logit, jnp.nan)
        logsumexp = jax.nn.logsumexp(logits, axis=-1)
        correct = (target_logit >= jax.lax.stop_gradient(logits).max(-1)) * 1.0
        mean_log_prob = logits.mean(-1) - logsumexp
        return TokenScores(target_logit - logsumexp, logsumexp, mean_log_prob, correct)

    length = target.shape[1]
    if length <= chunk:
        return score(kernel, bias, hidden, target)
    num_chunks = -(-length // chunk)
    padding = num_chunks * chunk - length

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(len(x), num_chunks, chunk, *x.shape[2:]).swapaxes(0, 1)

    def merge(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :length]

    # XLA merges no computations across the iterations of a scan, so no barrier is needed.
    score_chunk = functools.partial(jax.checkpoint(score, prevent_cse=False), kernel, bias)
    chunks = (split(hidden), split(target))
    _, scores = jax.lax.scan(lambda _, xs: (None, score_chunk(*xs)), None, chunks)
    return jax.tree.map(merge, scores)
