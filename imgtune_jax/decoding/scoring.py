"""Likelihood of given texts, for classification and multiple choice by a captioner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# (inputs [b ...], text i32[b l], text_mask bool[b l]) -> log p of every token but the first, given
# the tokens before it, in nats.
TokenLogProbs = Callable[[Any, Int[Array, "b l"], Bool[Array, "b l"]], Float[Array, "b t"]]


def score_texts(
    log_probs: TokenLogProbs,
    inputs: Any,
    text: Int[Array, "n l"],
    text_mask: Bool[Array, "n l"],
    target_mask: Bool[Array, "n l"],
    *,
    normalize_length: bool = False,
    block: int = 8,
) -> Float[Array, "b n"]:
    """Return log p(text | input) of every input and text, in nats (CapPa, 2306.07915, section 4.2).

    The sum is over the tokens under `target_mask`, which excludes the begin token and the tokens of
    a prompt. With `normalize_length`, the mean over these tokens is returned instead, so that long
    texts are not penalized. `block` texts are scored at a time, each against all inputs; they share
    what is computed from the inputs alone.
    """
    b = len(jax.tree.leaves(inputs)[0])

    def score_one(text_and_masks: tuple[Array, Array, Array]) -> Float[Array, " b"]:
        ids, mask, target = (jnp.broadcast_to(x[None], (b, len(x))) for x in text_and_masks)
        target = target[:, 1:]
        total = jnp.where(target, log_probs(inputs, ids, mask), 0).sum(1)
        return total / jnp.maximum(target.sum(1), 1) if normalize_length else total

    texts = (text, text_mask, target_mask)
    return jax.lax.map(score_one, texts, batch_size=min(block, len(text))).T
