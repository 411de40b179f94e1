"""Zero-shot classification: an image's class is the one whose prompts lie nearest to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from imgtune_jax.data import Source
from imgtune_jax.evals.checks import check_finite, checked_labels
from imgtune_jax.evals.protocol import Predictor
from imgtune_jax.evals.templates import CLASSNAMES, TEMPLATES

Templates = Sequence[str] | Mapping[str, Sequence[str]]


def class_embeddings(
    encoders: Predictor,
    classnames: Sequence[str],
    templates: Templates,
) -> Float[np.ndarray, "c d"]:
    """One unit vector per class: the mean of its prompts' unit vectors, normalised again (CLIP).

    Prompts are those of `prompts_of`. Every distinct one is encoded once.
    """
    per_class = [class_prompts(name, templates) for name in classnames]
    distinct = list(dict.fromkeys(prompt for prompts in per_class for prompt in prompts))
    row_of = {prompt: row for row, prompt in enumerate(distinct)}
    emb = np.asarray(encoders.embed_texts(distinct), np.float32)
    means = np.stack([emb[[row_of[p] for p in prompts]].mean(0) for prompts in per_class])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def true_class_ranks(
    emb: Float[np.ndarray, "n d"],
    class_emb: Float[np.ndarray, "c d"],
    labels: Int[np.ndarray, " n"],
    *,
    chunk: int = 4096,
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """The predicted class, and how many classes come before the true one (0: it is predicted).

    Of equal scores the lower class comes first, as in an argmax. Only `chunk` rows of scores exist
    at a time.
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
    """As `true_class_ranks`, of scores that are at hand."""
    label = labels[:, None]
    own = np.take_along_axis(scores, label, 1)
    ahead = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < label))
    return scores.argmax(1), ahead.sum(1)


class PerClassScores(NamedTuple):
    """Precision, recall and F1 of every class, and its number of examples (support).

    A ratio over nothing (a class that is never predicted, say) is 0, as in scikit-learn's
    `zero_division=0`.
    """

    precision: Float[np.ndarray, " c"]
    recall: Float[np.ndarray, " c"]
    f1: Float[np.ndarray, " c"]
    support: Int[np.ndarray, " c"]
    predicted: Int[np.ndarray, " c"]  # how often the class was predicted


def per_class_scores(
    predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], *, num_classes: int
) -> PerClassScores:
    """Count hits class by class."""
    support = np.bincount(labels, minlength=num_classes)
    claimed = np.bincount(predicted, minlength=num_classes)
    hits = np.bincount(labels[predicted == labels], minlength=num_classes)
    return PerClassScores(
        precision=hits / np.maximum(claimed, 1),
        recall=hits / np.maximum(support, 1),
        f1=2 * hits / np.maximum(support + claimed, 1),
        support=support,
        predicted=claimed,
    )


def classification_metrics(
    predicted: Int[np.ndarray, " n"],
    ranks: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    *,
    num_classes: int,
) -> dict[str, float]:
    """Accuracy and macro averages, in [0, 1].

    `mean_per_class_recall` is over the classes that have examples (scikit-learn's balanced
    accuracy); the macro F1 and precision are over the classes that have examples or were predicted
    (scikit-learn's default). With fewer than five classes there is no acc5.
    """
    scores = per_class_scores(predicted, labels, num_classes=num_classes)
    seen = scores.support > 0
    named = seen | (scores.predicted > 0)
    metrics = {f"acc{k}": float((ranks < k).mean()) for k in (1, 5) if k <= num_classes}
    return metrics | {
        "mean_per_class_recall": float(scores.recall[seen].mean()),
        "macro_precision": float(scores.precision[named].mean()),
        "macro_f1": float(scores.f1[named].mean()),
    }


@dataclass(frozen=True)
class ZeroShot:
    """Zero-shot classification of a labelled source.

    `classnames` are the names in the order of the labels, or a name of `CLASSNAMES`; `templates`
    are the prompts (see `prompts_of`), or a name of `TEMPLATES`. With `per_class`, the F1,
    precision, recall and support of each class are reported too, as `f1/<name>` and so on (classes
    that share a name get their label appended). Broken images leave; `num_broken` counts them.
    """

    task: ClassVar[str] = "zeroshot_classification"

    source: Source
    classnames: str | tuple[str, ...]
    templates: str | Templates = "openai_imagenet"
    per_class: bool = False
    language: str = "en"

    def __post_init__(self) -> None:
        for what, chosen, table in (
            ("class names", self.classnames, CLASSNAMES),
            ("prompt templates", self.templates, TEMPLATES),
        ):
            if isinstance(chosen, str) and chosen not in table:
                raise ValueError(
                    f"no {what} are called {chosen!r}; there are {sorted(table)}, or give your own"
                )
        if len(self.names) < 2:
            raise ValueError(f"class names are {self.names}; give two or more to choose from")

    @property
    def names(self) -> tuple[str, ...]:
        """The class names themselves."""
        chosen = self.classnames
        return CLASSNAMES[chosen]() if isinstance(chosen, str) else tuple(chosen)

    @property
    def resolved_templates(self) -> Templates:
        """The prompt templates themselves."""
        return TEMPLATES[self.templates] if isinstance(self.templates, str) else self.templates

    def __call__(self, encoders: Predictor) -> dict[str, float]:
        """acc1, acc5, mean_per_class_recall and the rest, by name."""
        image_emb, valid = encoders.embed_images(self.source)
        labels = checked_labels(self.source, valid, num_classes=len(self.names))
        class_emb = class_embeddings(encoders, self.names, self.resolved_templates)
        predicted, ranks = true_class_ranks(image_emb[valid], class_emb, labels)
        return self.metrics(predicted, ranks, labels, valid)

    def metrics(
        self,
        predicted: Int[np.ndarray, " n"],
        ranks: Int[np.ndarray, " n"],
        labels: Int[np.ndarray, " n"],
        valid: Bool[np.ndarray, " m"],
    ) -> dict[str, float]:
        """What is reported of predictions for the valid images."""
        names = self.names
        metrics = classification_metrics(predicted, ranks, labels, num_classes=len(names))
        metrics |= {"num_images": float(len(labels)), "num_broken": float((~valid).sum())}
        if self.per_class:
            metrics |= _by_class(per_class_scores(predicted, labels, num_classes=len(names)), names)
        return metrics


def _by_class(scores: PerClassScores, names: Sequence[str]) -> dict[str, float]:
    unique = [c if names.count(c) == 1 else f"{c} ({i})" for i, c in enumerate(names)]
    return {
        f"{kind}/{name}": float(value)
        for kind in ("precision", "recall", "f1", "support")
        for name, value in zip(unique, getattr(scores, kind), strict=True)
    }


def class_prompts(name: str, templates: Templates) -> list[str]:
    """A class's prompts: of strings in which `{}` (or `{c}`) stands for its name, or as given.

    Templates by class name are finished prompts (CuPL, 2209.03320). Raises ValueError for a class
    without a prompt, and for templates that leave the name out or are the same.
    """
    if isinstance(templates, Mapping):
        prompts = list(templates.get(name, ()))
    else:
        prompts = [template.format(name, c=name) for template in templates]
        if len(set(prompts)) < len(prompts) or any(name not in p for p in prompts):
            raise ValueError(
                f"templates {list(templates)[:3]}… do not each give their own prompt with the name "
                "of the class in it; write {} where it belongs, and each template once"
            )
    if not prompts:
        raise ValueError(f"class {name!r} has no prompts; give it one at least")
    return prompts
