"""How likely given texts are: classification and multiple choice by a captioner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# (inputs [b ...], text i32[b l], text_mask bool[b l]) -> log p of each token but the first,
# given those before it.
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
    """log p(text | input) of every input and every text, in nats: CapPa's scoring classifier.

    Summed over the tokens under `target_mask`, which leaves out the begin token and what a prompt
    gives (2306.07915, section 4.2); with `normalize_length`, their mean, so that long answers are not at
    a loss. `block` texts are scored at a time, against all inputs: what is computed from the
    inputs alone is shared by them.
    """
    b = len(jax.tree.leaves(inputs)[0])

    def one(answer: tuple[Array, Array, Array]) -> Float[Array, " b"]:
        ids, mask, target = (jnp.broadcast_to(x[None], (b, len(x))) for x in answer)
        target = target[:, 1:]
        total = jnp.where(target, log_probs(inputs, ids, mask), 0).sum(1)
        return total / jnp.maximum(target.sum(1), 1) if normalize_length else total

    scores = jax.lax.map(one, (text, text_mask, target_mask), batch_size=min(block, len(text)))
    return scores.T
