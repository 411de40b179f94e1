"""Validation loss: the training objectives themselves, on held-out pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.data import Source, read_metadata
from imgtune_jax.evals.protocol import CaptionScores, Predictor
from imgtune_jax.types import Batch, ExpMean, Metric, Metrics, Outputs, metric_value

Objective = Callable[[Outputs, Batch], tuple[Float[Array, ""], Metrics]]


def evaluation_loss(
    objective: Objective,
    image_emb: Float[np.ndarray, "n d"] | None,
    text_emb: Float[np.ndarray, "n d"] | None,
    example_mask: Bool[np.ndarray, " n"],
    *,
    logit_scale: float | None = None,
    logit_bias: float | None = None,
    group: Int[np.ndarray, " n"] | None = None,
    captions: CaptionScores | None = None,
    batch_size: int | None = None,
) -> dict[str, float]:
    """`loss` and each of the objective's metrics, over fixed batches in order.

    A batch is `batch_size` consecutive rows (None: all rows are one batch), the last one filled up
    with masked rows. A metric is its summed sums over its summed counts, so each is a mean over
    whatever the objective counts; `loss` is the mean of the batches' losses, weighted by their
    numbers of valid examples. What the model does not give is None. A contrastive loss looks at
    the batch: an example's negatives are its batch's other examples, so compare numbers of one
    `batch_size` only, and expect a lower loss in a smaller last batch.
    """
    n = len(example_mask)
    if not example_mask.any():
        raise ValueError(f"none of the {n} examples is valid; a loss over nothing is not defined")
    size = n if batch_size is None else batch_size
    program = jax.jit(objective)
    fields: dict[str, Any] = dict(example_mask=example_mask, group=group)
    says: dict[str, Any] = dict(image_emb=image_emb, text_emb=text_emb)
    if captions is not None:
        fields |= dict(text_mask=captions.text_mask, target_mask=captions.target_mask)
        says["captions"] = captions.scores
    given = Batch(**fields), Outputs(**says)
    scalars = dict(logit_scale=_scalar(logit_scale), logit_bias=_scalar(logit_bias))
    totals: dict[str, Metric] = {}
    for start in range(0, n, size):
        rows = slice(start, start + size)

        def fill(x: np.ndarray, rows: slice = rows) -> jax.Array:
            part = x[rows]
            return jnp.asarray(np.pad(part, [(0, size - len(part))] + [(0, 0)] * (x.ndim - 1)))

        batch, outputs = jax.tree.map(fill, given)
        loss, metrics = jax.device_get(program(outputs.replace(**scalars), batch))
        count = example_mask[rows].sum()
        if count:  # a batch without a valid example has no loss
            metrics = {**metrics, "loss": (loss * count, count)}
            totals = {k: _added(totals.get(k), v) for k, v in metrics.items()}
    return {name: float(metric_value(total)) for name, total in totals.items() if total[1]}


def _scalar(x: float | None) -> jax.Array | None:
    return None if x is None else jnp.float32(x)


def _added(total: Metric | None, one: Metric) -> Metric:
    """In float64 on the host, of one kind with `one`."""
    pair: list[Any] = [np.float64(x) for x in one]
    if total is not None:
        pair = [x + y for x, y in zip(total, pair, strict=True)]
    return ExpMean(*pair) if isinstance(one, ExpMean) else (pair[0], pair[1])


@dataclass(frozen=True)
class ValidationLoss:
    """The training objective on a source: each image with the first caption of `caption_set`.

    `prefix` is what training put in front of that set's captions (config.data.prefixes).
    Records that cannot be read, or have no such caption, are masked and counted by `num_masked`.
    See `evaluation_loss` for what is averaged.
    """

    task: ClassVar[str] = "loss"

    source: Source
    objective: Objective
    caption_set: str = "caption"
    prefix: str = ""
    batch_size: int | None = None
    language: str = "en"

    def __call__(self, encoders: Predictor) -> dict[str, float]:
        """`loss`, and the objective's metrics by their names."""
        records = [read_metadata(self.source, i) for i in range(len(self.source))]
        named = [next(iter(r.captions.get(self.caption_set, ())), None) for r in records]
        texts, groups = [c or "" for c in named], [r.group for r in records]
        captions = encoders.caption_scores(self.source, texts, self.prefix)
        image_emb = text_emb = None
        if encoders.logit_scale is not None:
            image_emb, valid = encoders.embed_images(self.source)
            text_emb = encoders.embed_texts([self.prefix + text for text in texts])
        else:
            assert captions is not None, "a model matches or writes"
            valid = captions.valid
        valid = valid & np.array([c is not None for c in named])
        metrics = evaluation_loss(
            self.objective,
            image_emb,
            text_emb,
            valid,
            logit_scale=encoders.logit_scale,
            logit_bias=encoders.logit_bias,
            group=None if None in groups else np.asarray(groups),
            captions=captions,
            batch_size=self.batch_size,
        )
        return metrics | {"num_examples": float(valid.sum()), "num_masked": float((~valid).sum())}
