"""Image-text retrieval in both directions: recall at k, median and mean rank."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from imgtune_jax.data import Source, Tokenizer, read_metadata
from imgtune_jax.errors import UserError
from imgtune_jax.evals.checks import check_captions, check_has, check_images, no_captions_error
from imgtune_jax.evals.per_class import METRIC_NAME
from imgtune_jax.evals.protocol import Predictor
from imgtune_jax.evals.ranks import retrieval_ranks
from imgtune_jax.models import ImageTextModel


def retrieval_metrics(
    image_emb: Float[np.ndarray, "n d"],
    text_emb: Float[np.ndarray, "m d"],
    image_of_text: Int[np.ndarray, " m"],
    *,
    ks: Sequence[int] = (1, 5, 10),
    image_group: Int[np.ndarray, " n"] | None = None,
    chunk: int = 1024,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Return recall at k in [0, 1], median and mean rank (1 is best), with CLIP_benchmark's names.

    `image_retrieval_*` is text to image. `text_retrieval_*` is image to text, where any caption of
    the image is a hit. An image without a caption is a miss in recall, as in CLIP_benchmark, and
    left out of the median and mean rank. Values of k above the number of candidates are omitted.
    `retrieval_ranks` documents the arguments and the order of ties.
    """
    ranks = retrieval_ranks(
        image_emb, text_emb, image_of_text, image_group=image_group, chunk=chunk, mesh=mesh
    )
    return {
        **_rank_summary("image_retrieval", ranks.text_to_image, ks, candidates=len(image_emb)),
        **_rank_summary("text_retrieval", ranks.image_to_text, ks, candidates=len(text_emb)),
    }


def retrieval_metric_names(ks: Sequence[int], *, num_images: int) -> tuple[str, ...]:
    """Return the names of the metrics of `num_images` images; more texts than images may exist."""
    names = {
        "image_retrieval": [f"recall@{k}" for k in ks if k <= num_images],
        "text_retrieval": [f"recall@{k}" for k in ks],
    }
    return tuple(
        f"{direction}_{name}"
        for direction, recalls in names.items()
        for name in (*recalls, "median_rank", "mean_rank")
    )


def curve_names(metrics: Mapping[str, float], *, prefix: str = "val/") -> dict[str, float]:
    """Rename retrieval metrics to the names of training curves; add `prefix` to all names.

    `text_retrieval_recall@1` becomes `val/image_to_text_R@1`, and `image_retrieval_median_rank`
    becomes `val/text_to_image_median_rank`. Names of classes are not changed.
    """
    replacements = {
        "text_retrieval_": "image_to_text_",
        "image_retrieval_": "text_to_image_",
        "recall@": "R@",
    }

    def rename(name: str) -> str:
        if METRIC_NAME.fullmatch(name):
            return prefix + name
        return prefix + functools.reduce(
            lambda s, w: s.replace(w, replacements[w]), replacements, name
        )

    return {rename(name): value for name, value in metrics.items()}


def _rank_summary(
    name: str, ranks: Int[np.ndarray, " n"], ks: Sequence[int], *, candidates: int
) -> dict[str, float]:
    """Return recalls, median and mean rank; `ranks` count from 0, the metrics from 1."""
    has_positive = ranks >= 0
    recalls = {
        f"{name}_recall@{k}": float((has_positive & (ranks < k)).mean())
        for k in ks
        if k <= candidates
    }
    return recalls | {
        f"{name}_median_rank": float(np.median(ranks[has_positive])) + 1,
        f"{name}_mean_rank": float(ranks[has_positive].mean()) + 1,
    }


@dataclass(frozen=True)
class Retrieval:
    """Zero-shot retrieval over a source, in both directions.

    The texts are the captions in `caption_set`: all of them, or the first `max_captions` of each
    image. An unreadable image is excluded with its captions, and counted by `num_broken`. An image
    without a caption is a candidate, and a miss in the recall from image to text. With
    `use_groups`, the captions of a record's `group` are positives of all images of the group.
    """

    task: ClassVar[str] = "zeroshot_retrieval"

    source: Source
    caption_set: str = "caption"
    ks: tuple[int, ...] = (1, 5, 10)
    max_captions: int | None = None
    use_groups: bool = False
    language: str = "en"
    chunk: int = 1024
    mesh: Mesh | None = None

    def __call__(self, predictor: Predictor) -> dict[str, float]:
        """Return `retrieval_metrics`, `num_images`, `num_texts` and `num_broken`."""
        image_emb, valid = predictor.embed_images(self.source)
        captions, image_of_text, image_group = self.captions_and_groups(valid)
        metrics = retrieval_metrics(
            image_emb[valid],
            predictor.embed_texts(captions),
            image_of_text,
            ks=self.ks,
            image_group=image_group,
            chunk=self.chunk,
            mesh=self.mesh,
        )
        sizes = {
            "num_images": valid.sum(),
            "num_texts": len(captions),
            "num_broken": (~valid).sum(),
        }
        return metrics | {name: float(size) for name, size in sizes.items()}

    def metric_names(self) -> tuple[str, ...]:
        """Return the names of all metrics that a call may return."""
        sizes = ("num_images", "num_texts", "num_broken")
        return (*retrieval_metric_names(self.ks, num_images=len(self.source)), *sizes)

    def check(self, model: ImageTextModel, tokenizer: Tokenizer) -> None:
        """Raise UserError if the settings do not fit the source or the model."""
        del tokenizer
        check_has(model, "text")
        check_captions(self.source, self.caption_set)
        check_images(self.source)
        if self.use_groups and not getattr(self.source, "has_group", True):
            raise UserError(
                "use_groups is set, but the records have no group; set the source's group, or set "
                "use_groups to False"
            )

    def captions_and_groups(
        self, valid: Bool[np.ndarray, " n"]
    ) -> tuple[list[str], Int[np.ndarray, " m"], Int[np.ndarray, " n"] | None]:
        """Return captions, `image_of_text` (the index among valid images), and image groups.

        The groups are None unless `use_groups`. Raises UserError if no valid image has a caption.
        """
        captions: list[str] = []
        image_of_text: list[int] = []
        groups: list[int | None] = []
        for image, i in enumerate(np.flatnonzero(valid)):
            record = read_metadata(self.source, int(i))
            texts = record.captions.get(self.caption_set, ())[: self.max_captions]
            captions += texts
            image_of_text += [image] * len(texts)
            groups.append(record.group)
        if not captions:
            raise no_captions_error(
                self.source, self.caption_set, records=f"{len(groups)} readable records"
            )
        return captions, np.asarray(image_of_text), _group_numbers(groups, self.use_groups)


def _group_numbers(groups: list[int | None], use_groups: bool) -> Int[np.ndarray, " n"] | None:
    if not use_groups:
        return None
    if None in groups:
        raise UserError(
            f"use_groups is set, but {groups.count(None)} of {len(groups)} records have no group; "
            "add the missing groups, or set use_groups to False"
        )
    return np.asarray(groups)
