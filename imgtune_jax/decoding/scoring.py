"""Likelihood of given texts, for classification and multiple choice by a captioner.

Axis letters: b inputs, n texts, l tokens of a text, t = l - 1 predicted tokens.
"""

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
    """Return log p(text | input) for every input and text, in nats (Cap, 2306.07915, section 4.2).

    The log probability is the sum over the tokens where `target_mask` is True, which excludes the
    begin token and the prefix. With `normalize_length`, it is the mean over these tokens, so that
    long texts are not penalized. `block` texts at a time are scored, each for all inputs.
    Computations on the inputs alone are shared by the texts of a block.
    """
    b = len(jax.tree.leaves(inputs)[0])

    def score_one(text_and_masks: tuple[Array, Array, Array]) -> Float[Array, " b"]:
        ids, mask, target = (jnp.broadcast_to(x[None], (b, len(x))) for x in text_and_masks)
        target = target[:, 1:]
        total = jnp.where(target, log_probs(inputs, ids, mask), 0).sum(1)
        return total / jnp.maximum(target.sum(1), 1) if normalize_length else total

    texts = (text, text_mask, target_mask)
    return jax.lax.map(score_one, texts, batch_size=min(block, len(text))).T
