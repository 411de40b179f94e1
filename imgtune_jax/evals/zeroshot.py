"""Zero-shot classification: predict the class whose prompts are most similar to the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int

from imgtune_jax.data import Source, Tokenizer
from imgtune_jax.errors import UserError
from imgtune_jax.evals.checks import (
    check_finite,
    check_has,
    check_images,
    check_label_order,
    check_labels,
    checked_labels,
)
from imgtune_jax.evals.normalize import normalize_rows
from imgtune_jax.evals.per_class import per_class_metrics, per_class_scores
from imgtune_jax.evals.protocol import Predictor
from imgtune_jax.evals.templates import CLASSNAMES, TEMPLATES, fill_template
from imgtune_jax.models import ImageTextModel

Templates = Sequence[str] | Mapping[str, Sequence[str]]


def class_embeddings(
    predictor: Predictor,
    classnames: Sequence[str],
    templates: Templates,
) -> Float[np.ndarray, "c d"]:
    """Return a unit vector per class: the normalized mean of its prompts' embeddings, as in CLIP.

    The prompts are those of `class_prompts`. Each distinct prompt is encoded once.
    """
    per_class = [class_prompts(name, templates) for name in classnames]
    distinct = list(dict.fromkeys(prompt for prompts in per_class for prompt in prompts))
    row_of = {prompt: row for row, prompt in enumerate(distinct)}
    emb = np.asarray(predictor.embed_texts(distinct), np.float32)
    means = np.stack([emb[[row_of[p] for p in prompts]].mean(0) for prompts in per_class])
    return normalize_rows(means)


def true_class_ranks(
    emb: Float[np.ndarray, "n d"],
    class_emb: Float[np.ndarray, "c d"],
    labels: Int[np.ndarray, " n"],
    *,
    chunk: int = 4096,
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return the predicted classes, and the number of classes ranked before the true one.

    Ties go to the lower label, as in an argmax. Only `chunk` rows of scores are in memory at a
    time.
    """
    predicted, ranks = np.empty(len(emb), np.int64), np.empty(len(emb), np.int64)
    check_finite(emb, "image embeddings")
    check_finite(class_emb, "class embeddings")
    for start in range(0, len(emb), chunk):
        rows = slice(start, start + chunk)
        predicted[rows], ranks[rows] = ranks_from_scores(emb[rows] @ class_emb.T, labels[rows])
    return predicted, ranks


def ranks_from_scores(
    scores: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return what `true_class_ranks` returns, from the scores of all c classes.

    Raises UserError for a score that is not finite, and for a label outside 0 to c - 1.
    """
    check_finite(scores, "rows of class scores")
    num_classes = scores.shape[1]
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= num_classes:
        raise UserError(
            f"labels are from {labels.min()} to {labels.max()}; expected 0 to {num_classes - 1}"
        )
    label = labels[:, None]
    label_score = np.take_along_axis(scores, label, 1)
    is_lower = np.arange(num_classes) < label
    ahead = (scores > label_score) | ((scores == label_score) & is_lower)
    return scores.argmax(1), ahead.sum(1)


def classification_metrics(
    predicted: Int[np.ndarray, " n"],
    ranks: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    *,
    num_classes: int,
) -> dict[str, float]:
    """Return accuracy and macro averages, in [0, 1].

    `mean_per_class_recall` averages over the classes that have examples (scikit-learn's balanced
    accuracy). The macro F1 and precision average over the classes that have examples or were
    predicted (scikit-learn's default). acc5 is omitted for fewer than five classes.
    """
    scores = per_class_scores(predicted, labels, num_classes=num_classes)
    has_examples = scores.support > 0
    occurs = has_examples | (scores.predicted > 0)
    metrics = {f"acc{k}": float((ranks < k).mean()) for k in (1, 5) if k <= num_classes}
    return metrics | {
        "mean_per_class_recall": float(scores.recall[has_examples].mean()),
        "macro_precision": float(scores.precision[occurs].mean()),
        "macro_f1": float(scores.f1[occurs].mean()),
    }


def classification_metric_names(num_classes: int) -> tuple[str, ...]:
    """Return the names of `classification_metrics`."""
    one = np.zeros(1, np.int64)
    return tuple(classification_metrics(one, one, one, num_classes=num_classes))


@dataclass(frozen=True)
class ZeroShot:
    """Zero-shot classification of a labeled source.

    `classnames` are the names in the order of the labels, or a key of `CLASSNAMES`. They may differ
    from the names that the source has, but a name that both have must have the same label.
    `templates` are as in `class_prompts`, or a key of `TEMPLATES`. With `per_class`, the F1,
    precision, recall and support of each class are reported too, under the names of
    `per_class_metrics`. Unreadable images are excluded and counted by `num_broken`.
    """

    task: ClassVar[str] = "zeroshot_classification"

    source: Source
    classnames: str | tuple[str, ...]
    templates: str | Templates = "openai_imagenet"
    per_class: bool = False
    language: str = "en"

    def __post_init__(self) -> None:
        for field, value, table in (
            ("classnames", self.classnames, CLASSNAMES),
            ("templates", self.templates, TEMPLATES),
        ):
            if isinstance(value, str) and value not in table:
                raise UserError(
                    f"{field} = {value!r}; expected one of {sorted(table)}, or a list of strings"
                )
        if len(self.names) < 2:
            raise UserError(f"classnames = {self.names}; expected two or more names")
        check_label_order(self.names, self.source, name="classnames")

    @property
    def names(self) -> tuple[str, ...]:
        """The class names; a key is looked up in `CLASSNAMES`."""
        names = self.classnames
        return CLASSNAMES[names]() if isinstance(names, str) else tuple(names)

    @property
    def resolved_templates(self) -> Templates:
        """The prompt templates; a key is looked up in `TEMPLATES`."""
        return TEMPLATES[self.templates] if isinstance(self.templates, str) else self.templates

    def __call__(self, predictor: Predictor) -> dict[str, float]:
        """Return `acc1`, `acc5`, `mean_per_class_recall`, …, `num_images` and `num_broken`."""
        image_emb, valid = predictor.embed_images(self.source)
        labels = checked_labels(self.source, valid, num_classes=len(self.names))
        class_emb = class_embeddings(predictor, self.names, self.resolved_templates)
        predicted, ranks = true_class_ranks(image_emb[valid], class_emb, labels)
        return self.metrics(predicted, ranks, labels, valid)

    def metric_names(self) -> tuple[str, ...]:
        """Return the names of all metrics that a call may return."""
        one = np.zeros(1, np.int64)  # the names do not depend on the images
        return tuple(self.metrics(one, one, one, np.ones(1, bool)))

    def check(self, model: ImageTextModel, tokenizer: Tokenizer) -> None:
        """Raise UserError if the settings do not fit the source, the model or the tokenizer."""
        del tokenizer
        check_has(model, "text")
        self.check_classes()

    def check_classes(self) -> None:
        """Raise UserError for a class without prompts, and if labels or images cannot be used."""
        for name in self.names:
            class_prompts(name, self.resolved_templates)
        check_labels(self.source, len(self.names))
        check_images(self.source)

    def metrics(
        self,
        predicted: Int[np.ndarray, " n"],
        ranks: Int[np.ndarray, " n"],
        labels: Int[np.ndarray, " n"],
        valid: Bool[np.ndarray, " m"],
    ) -> dict[str, float]:
        """Return the metrics of n valid images; `valid` is the mask over all m images."""
        names = self.names
        metrics = classification_metrics(predicted, ranks, labels, num_classes=len(names))
        metrics |= {"num_images": float(len(labels)), "num_broken": float((~valid).sum())}
        if self.per_class:
            metrics |= per_class_metrics(
                per_class_scores(predicted, labels, num_classes=len(names)), names
            )
        return metrics


def class_prompts(name: str, templates: Templates) -> list[str]:
    """Return the prompts of a class.

    A sequence of templates is filled by `fill_template`. A mapping has the complete prompts of each
    class, by class name (as in CuPL, 2209.03320). Raises UserError for a class without a prompt,
    for one string instead of several, and for templates without the name or not distinct.
    """
    is_mapping = isinstance(templates, Mapping)
    given = templates.get(name, ()) if is_mapping else templates
    if isinstance(given, str):
        raise UserError(f"templates = {given!r}, one string; expected a list of strings")
    prompts = list(given) if is_mapping else [fill_template(template, name) for template in given]
    if not prompts:
        raise UserError(f"class {name!r} has no prompts; add at least one")
    if not is_mapping and len(set(prompts)) < len(prompts):
        raise UserError(f"templates = {list(given)[:3]}…; expected distinct strings")
    return prompts
