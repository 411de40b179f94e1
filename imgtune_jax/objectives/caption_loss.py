"""Captioning loss: cross-entropy of the next token (Cap, 2306.07915; CoCa, 2205.01917)."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from imgtune_jax.types import Batch, ExpMean, Metrics, Outputs, TokenScores


def token_cross_entropy(
    scores: TokenScores,
    mask: Bool[Array, "b t"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Array, ""]:
    """Return the cross-entropy of the tokens under `mask`, in nats, averaged over them.

        loss = mean of -(1 - ε) log p(token) - ε/v Σ_k log p(k) + z_loss · (logsumexp of logits)²

    ε is `label_smoothing`, the share of the target that is uniform over the vocabulary of v tokens
    (1512.00567). `z_loss` keeps the logits near 0 (PaLM, 2204.02311, section 5). If `mask` is False
    everywhere, the loss is 0.
    """
    loss = -(1 - label_smoothing) * scores.log_prob - label_smoothing * scores.mean_log_prob
    loss = loss + z_loss * jnp.square(scores.logsumexp)
    return _masked_sum(loss, mask) / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1)


@dataclass(frozen=True)
class CaptionLoss:
    """`token_cross_entropy` as an objective: mean over the caption tokens of the global batch.

    The mean does not depend on sharding or accumulation. The loss covers the tokens under
    `batch.target_mask` (by default, under `text_mask`): captions and their end tokens. The begin
    token, prompts and padding are excluded by this mask, not by their ids.

    The metrics leave out smoothing and z-loss: "captioning", in nats per token, its exponential
    "perplexity", and "token_accuracy".
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1 or self.z_loss < 0:
            raise ValueError(
                f"objective 'captioning': label_smoothing = {self.label_smoothing}, z_loss = "
                f"{self.z_loss}; expected 0 <= label_smoothing < 1 and 0 <= z_loss"
            )

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        """Return (loss, metrics). Raises ValueError if the outputs have no token scores."""
        scores = outputs.token_scores
        if scores is None:
            raise ValueError(
                "objective 'captioning': the model returned no token_scores; it needs a model with "
                "a decoder (config.model.decoder) and batches with images and text"
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
    """Return the mask of the tokens that contribute to the loss, from the second token on."""
    assert batch.text_mask is not None
    mask = batch.text_mask if batch.target_mask is None else batch.target_mask & batch.text_mask
    return mask[:, 1:] & batch.example_mask[:, None]
