"""Sigmoid contrastive loss (SigLIP, 2303.15343)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from imgtune_jax.objectives.contrastive import Positives, embeddings, pair_logits, positive_pairs
from imgtune_jax.types import Batch, Metrics, Outputs


@dataclass(frozen=True)
class Sigmoid:
    """Sum over all pairs of valid examples, divided by the number of valid examples (Algorithm 1).

    -log σ(z · (scale · cos + bias)), z = +1 for a positive pair and -1 for a negative one. A model
    without a `logit_bias` runs with a bias of 0.
    """

    positives: Positives = Positives.PAIR

    def __post_init__(self) -> None:
        object.__setattr__(self, "positives", Positives(self.positives))

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        """Loss and its metrics; exact over the global batch."""
        image, text = embeddings(outputs, "sigmoid")
        assert outputs.logit_scale is not None  # a model with embeddings has one
        logits = pair_logits(image, text, outputs.logit_scale)
        if outputs.logit_bias is not None:
            logits = logits + outputs.logit_bias
        sign = jnp.where(positive_pairs(batch, self.positives), 1.0, -1.0)
        valid = batch.example_mask[:, None] & batch.example_mask[None, :]
        total = -jnp.sum(jnp.where(valid, jax.nn.log_sigmoid(sign * logits), 0.0))
        count = jnp.sum(batch.example_mask, dtype=jnp.float32)
        return total / jnp.maximum(count, 1), {"sigmoid": (total, count)}
