"""Captioning loss: cross-entropy of the next token (Cap, 2306.07915; CoCa, 2205.01917)."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from imgtune_jax.errors import UserError
from imgtune_jax.types import Batch, ExpMean, Metrics, Outputs, TokenScores


def token_cross_entropy(
    scores: TokenScores,
    mask: Bool[Array, "b t"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Array, ""]:
    """Return the mean cross-entropy, in nats, of the tokens where `mask` is True.

        loss = mean[-(1 - ε) log p(token) - ε/v Σ_k log p(k) + z_loss · (logsumexp of logits)²]

    ε is `label_smoothing`: a fraction ε of the target distribution is uniform over the v tokens of
    the vocabulary (1512.00567). `z_loss` keeps the logsumexp of the logits near 0 (PaLM,
    2204.02311, section 5). The loss is 0 if `mask` is False everywhere.
    """
    loss = -(1 - label_smoothing) * scores.log_prob - label_smoothing * scores.mean_log_prob
    loss = loss + z_loss * jnp.square(scores.logsumexp)
    return _masked_sum(loss, mask) / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1)


@dataclass(frozen=True)
class CaptionLoss:
    """`token_cross_entropy` as an objective: the mean over the caption tokens of the global batch.

    The mean does not depend on sharding or accumulation. The loss covers the tokens where
    `batch.target_mask` is True: the captions with their end tokens. Without a `target_mask`, it
    covers those where `text_mask` is True. The masks, not the token ids, exclude the begin token,
    the prefix and padding.

    The metrics do not include label smoothing and z-loss. They are "captioning" (the cross-entropy
    in nats per token), "perplexity" (its exponential) and "token_accuracy".
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1 or self.z_loss < 0:
            raise UserError(
                f"objective 'captioning': label_smoothing = {self.label_smoothing}, z_loss = "
                f"{self.z_loss}; expected 0 <= label_smoothing < 1 and 0 <= z_loss"
            )

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        """Return (loss, metrics). Raises UserError if the outputs have no token scores."""
        scores = outputs.token_scores
        if scores is None:
            raise UserError(
                "objective 'captioning': the model returned no token_scores; captioning needs a "
                "model with a decoder (config.model.decoder) and batches with images and text"
            )
        mask = _target_mask(batch)
        count = jnp.sum(mask, dtype=jnp.float32)
        cross_entropy = _masked_sum(-scores.log_prob, mask)
        metrics: Metrics = {
            "captioning": (cross_entropy, count),
            "perplexity": ExpMean(cross_entropy, count),
            "token_accuracy": (_masked_sum(scores.correct, mask), count),
        }
        loss = token_cross_entropy(
            scores, mask, label_smoothing=self.label_smoothing, z_loss=self.z_loss
        )
        return loss, metrics


def _masked_sum(x: Float[Array, "b t"], mask: Bool[Array, "b t"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(mask, x, 0.0))


def _target_mask(batch: Batch) -> Bool[Array, "b t"]:
    """Return the mask of the tokens in the loss. Column 0 is the second token of the text."""
    assert batch.text_mask is not None
    mask = batch.text_mask if batch.target_mask is None else batch.target_mask & batch.text_mask
    return mask[:, 1:] & batch.example_mask[:, None]
