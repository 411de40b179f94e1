"""Validation loss: the training objectives on held-out pairs of images and captions."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from imgtune_jax.data import Source, Tokenizer, read_metadata
from imgtune_jax.errors import UserError
from imgtune_jax.evals.checks import check_captions, check_images
from imgtune_jax.evals.protocol import CaptionScores, Predictor
from imgtune_jax.models import ImageTextModel
from imgtune_jax.objectives import Objective
from imgtune_jax.types import Batch, ExpMean, Metric, Metrics, Outputs, TokenScores, metric_value


def evaluation_loss(
    objective: Objective,
    image_emb: Float[np.ndarray, "n d"] | None,
    text_emb: Float[np.ndarray, "n d"] | None,
    example_mask: Bool[np.ndarray, " n"],
    *,
    logit_scale: float | None = None,
    logit_bias: float | None = None,
    group: Int[np.ndarray, " n"] | None = None,
    caption_scores: CaptionScores | None = None,
    batch_size: int | None = None,
) -> dict[str, float]:
    """Return `loss` and the metrics of the objective, over fixed batches in order.

    A batch has `batch_size` consecutive rows (None: one batch of all rows). The last batch is
    padded with masked rows. The objective returns each metric as a sum and a count; both are added
    over all batches before the division. `loss` is the mean of the batch losses, weighted by the
    number of valid examples. Pass None for outputs that the model lacks.

    The negatives of a contrastive loss are the other examples of the batch. Compare such losses
    only if they have the same `batch_size`; a smaller last batch has a lower loss. Raises
    UserError if no example is valid.
    """
    n = len(example_mask)
    if not example_mask.any():
        raise UserError(
            f"none of the {n} examples is valid; expected at least one image that has a caption"
        )
    size = n if batch_size is None else batch_size
    compiled_objective = jax.jit(objective)
    batch_fields: dict[str, Any] = dict(example_mask=example_mask, group=group)
    output_fields: dict[str, Any] = dict(image_emb=image_emb, text_emb=text_emb)
    if caption_scores is not None:
        batch_fields["text_mask"] = caption_scores.text_mask
        batch_fields["target_mask"] = caption_scores.target_mask
        output_fields["token_scores"] = caption_scores.scores
    all_rows = Batch(**batch_fields), Outputs(**output_fields)
    scalars = dict(logit_scale=_scalar(logit_scale), logit_bias=_scalar(logit_bias))
    totals: dict[str, Metric] = {}
    for start in range(0, n, size):
        rows = slice(start, start + size)
        batch, outputs = jax.tree.map(functools.partial(_padded_rows, rows=rows), all_rows)
        loss, metrics = jax.device_get(compiled_objective(outputs.replace(**scalars), batch))
        count = example_mask[rows].sum()
        if count:  # a batch without a valid example has no loss
            metrics = {**metrics, "loss": (loss * count, count)}
            totals = {k: _add_metrics(totals.get(k), v) for k, v in metrics.items()}
    return {name: float(metric_value(total)) for name, total in totals.items() if total[1]}


def _scalar(x: float | None) -> jax.Array | None:
    return None if x is None else jnp.float32(x)


def _padded_rows(x: np.ndarray, *, rows: slice) -> jax.Array:
    """Return x[rows], with rows of zeros after the end of x."""
    missing = rows.stop - rows.start - len(x[rows])
    return jnp.asarray(np.pad(x[rows], [(0, missing)] + [(0, 0)] * (x.ndim - 1)))


def _add_metrics(total: Metric | None, metric: Metric) -> Metric:
    """Add a metric to a total (None: 0) in float64; the result has the type of `metric`."""
    pair: list[Any] = [np.float64(x) for x in metric]
    if total is not None:
        pair = [x + y for x, y in zip(total, pair, strict=True)]
    return ExpMean(*pair) if isinstance(metric, ExpMean) else (pair[0], pair[1])


def _abstract_metrics(
    objective: Objective, *, embeddings: bool, captions: bool, bias: bool, group: bool
) -> Metrics:
    """Return the metrics of an objective on outputs that a model with these parts has, as shapes.

    Raises the errors that the objective raises for outputs that it cannot use.
    """
    abstract: Any = jax.ShapeDtypeStruct
    rows, length = 2, 3
    emb = abstract((rows, 4), jnp.float32) if embeddings else None
    scalar = abstract((), jnp.float32)
    scores = TokenScores(*[abstract((rows, length - 1), jnp.float32)] * 4) if captions else None
    outputs = Outputs(
        image_emb=emb,
        text_emb=emb,
        logit_scale=scalar if embeddings else None,
        logit_bias=scalar if bias else None,
        token_scores=scores,
    )
    mask = abstract((rows, length), jnp.bool_)
    batch = Batch(
        example_mask=abstract((rows,), jnp.bool_),
        text_mask=mask,
        target_mask=mask,
        group=abstract((rows,), jnp.int32) if group else None,
    )
    return jax.eval_shape(objective, outputs, batch)[1]


@dataclass(frozen=True)
class ValidationLoss:
    """The training objective on a source. An image's text is its first caption in `caption_set`.

    `prefix` is the prefix that training adds to captions of that set (config.data.prefixes).
    Records that are unreadable or have no such caption are masked and counted by `num_masked`.
    `evaluation_loss` documents how batches are averaged.
    """

    task: ClassVar[str] = "loss"

    source: Source
    objective: Objective
    caption_set: str = "caption"
    prefix: str = ""
    batch_size: int | None = None
    language: str = "en"

    def __call__(self, predictor: Predictor) -> dict[str, float]:
        """Return `loss` and the objective's metrics by name."""
        records = [read_metadata(self.source, i) for i in range(len(self.source))]
        captions = [next(iter(x.captions.get(self.caption_set, ())), None) for x in records]
        texts, groups = [c or "" for c in captions], [x.group for x in records]
        caption_scores = predictor.caption_scores(self.source, texts, self.prefix)
        image_emb = text_emb = None
        if predictor.logit_scale is not None:
            image_emb, readable = predictor.embed_images(self.source)
            text_emb = predictor.embed_texts(texts, self.prefix)
        else:
            assert caption_scores is not None, "every model has a text tower or a decoder"
            readable = caption_scores.valid
        valid = readable & np.array([c is not None for c in captions])
        metrics = evaluation_loss(
            self.objective,
            image_emb,
            text_emb,
            valid,
            logit_scale=predictor.logit_scale,
            logit_bias=predictor.logit_bias,
            group=None if None in groups else np.asarray(groups),
            caption_scores=caption_scores,
            batch_size=self.batch_size,
        )
        return metrics | {"num_examples": float(valid.sum()), "num_masked": float((~valid).sum())}

    def metric_names(self) -> tuple[str, ...]:
        """Return the names of all metrics that a call may return."""
        parts = dict(embeddings=True, captions=True, bias=False, group=True)
        return ("loss", *_abstract_metrics(self.objective, **parts), "num_examples", "num_masked")

    def check(self, model: ImageTextModel, tokenizer: Tokenizer) -> None:
        """Raise UserError if the settings do not fit the source, the model or the tokenizer."""
        tokenizer.prompt_ids(self.prefix)
        check_captions(self.source, self.caption_set)
        check_images(self.source)
        _abstract_metrics(
            self.objective,
            embeddings=model.text is not None,
            captions=model.decoder is not None,
            bias=model.logit_bias_init is not None,
            group=getattr(self.source, "has_group", True),
        )
