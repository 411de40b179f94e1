"""Checks of evaluators' inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from imgtune_jax.data import (
    BadRecord,
    Source,
    class_names,
    decode_image,
    evenly_spaced,
    read_metadata,
)
from imgtune_jax.errors import UserError
from imgtune_jax.models import ImageTextModel

MAX_CHECKED_IMAGES, MAX_CHECKED_LABELS = 16, 64


def check_finite(rows: Float[np.ndarray, "n d"], name: str) -> None:
    """Raise UserError for a row with a NaN or an infinity; `name` describes the rows in it.

    No score compares greater than a NaN, so a positive with a NaN would have the best rank.
    """
    bad = np.flatnonzero(~np.isfinite(rows).all(1))
    if bad.size:
        raise UserError(
            f"{bad.size} of {len(rows)} {name} are not finite (the first is row {bad[0]}); "
            "mask unreadable images, or look for an overflow in the model"
        )


def checked_labels(
    source: Source, valid: Bool[np.ndarray, " n"], *, num_classes: int
) -> Int[np.ndarray, " m"]:
    """Return the labels of the readable records.

    Raises UserError for a label outside 0 to num_classes - 1, and if no record is readable.
    """
    labels = [read_metadata(source, int(i)).label for i in np.flatnonzero(valid)]
    if not labels:
        raise UserError(f"none of the {len(valid)} records could be read; check the source's files")
    bad = [label for label in labels if label is None or not 0 <= label < num_classes]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(labels)} readable records have an invalid label, such as "
            f"{bad[0]}; expected labels from 0 to {num_classes - 1}"
        )
    return np.asarray(labels, np.int64)


def check_label_order(names: Sequence[str], source: Source, *, name: str) -> None:
    """Raise UserError if a class of `source` has another label in `names`.

    `names` are class names in the order of the labels; `name` is their name in the error. Case and
    punctuation are ignored. A class that occurs in only one of the two is not compared, since a
    data set may have identifiers such as n01440764 instead of names.
    """
    own = class_names(source)
    labels, own_labels = _labels_of(names), _labels_of(own)
    for key, own_label in own_labels.items():
        if key in labels and not labels[key] & own_label:
            raise UserError(
                f"{name} has the class {own[min(own_label)]!r} at label {min(labels[key])}, but "
                f"in the source it has label {min(own_label)}; list the classes in the order of "
                f"the source's labels: {', '.join(own[:8])}{', …' if len(own) > 8 else ''}"
            )


def _labels_of(names: Sequence[str]) -> dict[str, set[int]]:
    """Return the labels of each name, in lower case and without punctuation."""
    labels: dict[str, set[int]] = {}
    for label, name in enumerate(names):
        key = " ".join(re.split(r"[\W_]+", name.casefold())).strip()
        labels.setdefault(key or name, set()).add(label)
    return labels


def check_has(model: ImageTextModel, component: str) -> None:
    """Raise UserError if the model lacks a component: "text" or "decoder"."""
    if getattr(model, component) is None:
        needs = {"text": "a text tower, to embed texts", "decoder": "a decoder, to score captions"}
        raise UserError(
            f"the evaluator needs {needs[component]}; set config.model.{component}, or remove the "
            "evaluator"
        )


def check_images(source: Source) -> None:
    """Raise UserError if none of up to MAX_CHECKED_IMAGES evenly spaced images can be read."""
    faults = []
    for i in evenly_spaced(len(source), MAX_CHECKED_IMAGES):
        if (fault := _image_fault(source, i)) is None:
            return
        faults.append(fault)
    raise UserError(
        f"none of {len(faults)} images of the source can be read; the first: {faults[0]}; check "
        "the source's files"
    )


def check_captions(source: Source, caption_set: str) -> None:
    """Raise UserError if no record of the source has a caption in the set.

    Reads the metadata of records until one has a caption.
    """
    if not any(read_metadata(source, i).captions.get(caption_set) for i in range(len(source))):
        raise no_captions_error(source, caption_set, records=f"{len(source)} records")


def no_captions_error(source: Source, caption_set: str, *, records: str) -> UserError:
    """Return the error for `records`, such as "5 records", none of which has such a caption."""
    return UserError(
        f"none of the {records} has a caption in the set {caption_set!r}; the first record has the "
        f"sets {sorted(read_metadata(source, 0).captions)}; set caption_set to one of them"
    )


def check_labels(source: Source, num_classes: int) -> None:
    """Raise UserError if a readable one of a few records has no label below `num_classes`."""
    for i in evenly_spaced(len(source), MAX_CHECKED_LABELS):
        record = read_metadata(source, i)
        has_label = record.label is not None and 0 <= record.label < num_classes
        if not has_label and _image_fault(source, i) is None:
            raise UserError(
                f"record {record.key} has the label {record.faults.get('label', record.label)}; "
                f"expected labels from 0 to {num_classes - 1}: set the source's label, or the "
                "number of classes"
            )


def _image_fault(source: Source, index: int) -> BadRecord | None:
    """Return the reason that an image cannot be read, or None if it can."""
    record = source[index]
    try:
        record.check("image")
        decode_image(record.image)
    except BadRecord as bad:
        return bad
    return None
