"""Captioning loss: the next token's cross-entropy (Cap, 2306.07915; CoCa, 2205.01917)."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from imgtune_jax.types import Batch, ExpMean, Metrics, Outputs


@dataclass(frozen=True)
class CaptionLoss:
    """Mean nats per caption token of the global batch, however it is sharded or accumulated.

    A token carries loss where `batch.target_mask` holds (else `text_mask`): captions and their end
    do; the begin token, prompts and padding do not, whatever their ids. `label_smoothing` spreads
    that share of the target over the vocabulary (1512.00567); `z_loss` times the squared logsumexp
    keeps logits near 0 (PaLM, 2204.02311, section 5).

    Reported under the term's name are the plain nats, without smoothing and z-loss, whose
    exponential is the perplexity.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1 or self.z_loss < 0:
            raise ValueError(
                f"label_smoothing = {self.label_smoothing}, z_loss = {self.z_loss}; wanted "
                "0 <= label_smoothing < 1 and 0 <= z_loss"
            )

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        """Loss and its metrics. Raises ValueError when the model wrote no captions."""
        scores = outputs.token_scores
        if scores is None:
            raise ValueError(
                "objective 'captioning' needs a model with a decoder (config.model.decoder) and a "
                "batch with images and text"
            )
        mask = _targets(batch)
        nats = -scores.log_prob
        loss = (1 - self.label_smoothing) * nats - self.label_smoothing * scores.mean_log_prob
        loss = loss + self.z_loss * jnp.square(scores.logsumexp)

        def total(x: Array) -> Array:
            return jnp.sum(jnp.where(mask, x, 0.0))

        count = jnp.sum(mask, dtype=jnp.float32)
        metrics: Metrics = {
            "captioning": (total(nats), count),
            "perplexity": ExpMean(total(nats), count),
            "token_accuracy": (total(scores.correct), count),
        }
        return total(loss) / jnp.maximum(count, 1), metrics


def _targets(batch: Batch) -> Bool[Array, "b t"]:
    """Which of the tokens behind the first carry loss."""
    assert batch.text_mask is not None
    mask = batch.text_mask if batch.target_mask is None else batch.target_mask & batch.text_mask
    return mask[:, 1:] & batch.example_mask[:, None]
