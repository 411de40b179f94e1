"""Softmax contrastive loss (CLIP, 2103.00020)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from imgtune_jax.objectives.contrastive import Positives, embeddings, pair_logits, positive_pairs
from imgtune_jax.types import Batch, Metrics, Outputs


@dataclass(frozen=True)
class Softmax:
    """Mean nats per valid example, averaged over image→text and text→image.

    The negatives of an example are all other valid examples of the *global* batch, however it is
    sharded or accumulated. With several positives the target is uniform over them.
    """

    label_smoothing: float = 0.0
    positives: Positives = Positives.PAIR

    def __post_init__(self) -> None:
        object.__setattr__(self, "positives", Positives(self.positives))
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing = {self.label_smoothing}; wanted 0 <= it < 1")

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        """Raises ValueError when the model has a logit bias: such weights are a sigmoid model's."""
        if outputs.logit_bias is not None:
            raise ValueError(
                "softmax loss with a logit_bias: a softmax cannot see it, and weights trained with "
                "one are a sigmoid model's; use the 'sigmoid' objective or "
                "config.model.logit_bias_init=None"
            )
        image, text = embeddings(outputs, "softmax")
        assert outputs.logit_scale is not None  # a model with embeddings has one
        logits = pair_logits(image, text, outputs.logit_scale)
        positive = positive_pairs(batch, self.positives)
        nats_i, hits_i = self._one_way(logits, positive, batch.example_mask)
        nats_t, hits_t = self._one_way(logits.T, positive.T, batch.example_mask)
        count = jnp.sum(batch.example_mask, dtype=jnp.float32)
        total = (nats_i + nats_t) / 2
        metrics: Metrics = {
            "softmax": (total, count),
            "batch_image_to_text_R@1": (hits_i, count),
            "batch_text_to_image_R@1": (hits_t, count),
        }
        return total / jnp.maximum(count, 1), metrics

    def _one_way(
        self, logits: Float[Array, "b b"], positive: Bool[Array, "b b"], valid: Bool[Array, " b"]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """(summed nats, number of rows whose best column is a positive) over valid rows."""
        # A finite floor, not -inf: a wholly masked row must give 0 * finite, not 0 * nan.
        logits = jnp.where(valid[None, :], logits, -1e30)
        log_p = jax.nn.log_softmax(logits, axis=1)
        target = positive / jnp.maximum(positive.sum(1, keepdims=True), 1)
        uniform = valid[None, :] / jnp.maximum(valid.sum(), 1)
        target = (1 - self.label_smoothing) * target + self.label_smoothing * uniform
        nats = -jnp.sum(jnp.where(target > 0, target * log_p, 0.0), axis=1)
        best = jnp.argmax(logits, axis=1)
        hit = jnp.take_along_axis(positive, best[:, None], axis=1)[:, 0]
        return jnp.sum(jnp.where(valid, nats, 0.0)), jnp.sum(hit & valid, dtype=jnp.float32)
