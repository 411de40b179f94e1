"""Validation loss: the training objectives themselves, on held-out pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.data import Source, describe
from imgtune_jax.evals.protocol import Encoders
from imgtune_jax.types import Batch, Metrics, Outputs

Objective = Callable[[Outputs, Batch], tuple[Float[Array, ""], Metrics]]


def evaluation_loss(
    objective: Objective,
    image_emb: Float[np.ndarray, "n d"],
    text_emb: Float[np.ndarray, "n d"],
    example_mask: Bool[np.ndarray, " n"],
    *,
    logit_scale: float,
    logit_bias: float | None = None,
    group: Int[np.ndarray, " n"] | None = None,
    batch_size: int | None = None,
) -> dict[str, float]:
    """`loss` and each of the objective's metrics, over fixed batches in order.

    A batch is `batch_size` consecutive rows (None: all rows are one batch), the last one filled up
    with masked rows. A metric is its summed sums over its summed counts, so each is a mean over
    whatever the objective counts; `loss` is the mean of the batches' losses, weighted by their
    numbers of valid examples. A contrastive loss looks at the batch: an example's negatives are
    its batch's other examples, so compare numbers of one `batch_size` only, and expect a lower
    loss in a smaller last batch.
    """
    n = len(example_mask)
    if not example_mask.any():
        raise ValueError(f"none of the {n} examples is valid; a loss over nothing is not defined")
    size = n if batch_size is None else batch_size
    program = jax.jit(objective)
    scale = jnp.float32(logit_scale)
    bias = None if logit_bias is None else jnp.float32(logit_bias)
    totals: dict[str, np.ndarray] = {}
    for start in range(0, n, size):
        rows = slice(start, start + size)

        def fill(x: np.ndarray, rows: slice = rows) -> jax.Array:
            part = x[rows]
            return jnp.asarray(np.pad(part, [(0, size - len(part))] + [(0, 0)] * (x.ndim - 1)))

        outputs = Outputs(fill(image_emb), fill(text_emb), scale, bias)
        batch = Batch(fill(example_mask), group=None if group is None else fill(group))
        loss, metrics = jax.device_get(program(outputs, batch))
        count = example_mask[rows].sum()
        if count:  # a batch without a valid example has no loss
            for name, pair in {**metrics, "loss": (loss * count, count)}.items():
                totals[name] = totals.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
    return {name: float(total / count) for name, (total, count) in totals.items() if count}


@dataclass(frozen=True)
class Loss:
    """The training objective on a source: each image with the first caption of `caption_set`.

    Records that cannot be read, or have no such caption, are masked and counted by `num_masked`.
    See `evaluation_loss` for what is averaged.
    """

    task: ClassVar[str] = "loss"

    source: Source
    objective: Objective
    caption_set: str = "caption"
    batch_size: int | None = None
    language: str = "en"

    def __call__(self, encoders: Encoders) -> dict[str, float]:
        """`loss`, and the objective's metrics by their names."""
        image_emb, valid = encoders.images(self.source)
        records = [describe(self.source, i) for i in range(len(self.source))]
        captions = [next(iter(r.captions.get(self.caption_set, ())), None) for r in records]
        groups = [r.group for r in records]
        valid = valid & np.array([c is not None for c in captions])
        metrics = evaluation_loss(
            self.objective,
            image_emb,
            encoders.texts([c or "" for c in captions]),
            valid,
            logit_scale=encoders.logit_scale,
            logit_bias=encoders.logit_bias,
            group=None if None in groups else np.asarray(groups),
            batch_size=self.batch_size,
        )
        return metrics | {"num_examples": float(valid.sum()), "num_masked": float((~valid).sum())}
