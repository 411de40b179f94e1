"""Sampling of one caption from the caption sets of a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from imgtune_jax.data.record import BadRecord, FaultCause, Record
from imgtune_jax.errors import UserError


class PrefixedCaption(NamedTuple):
    """A caption and the prefix before it. No loss is computed on the prefix."""

    text: str
    prefix: str = ""


@dataclass(frozen=True)
class CaptionSampler:
    """Sample a caption set by weight; then, uniformly, one of its captions and of its templates.

    A caption set is a named group of captions, such as "name" or "keywords". `weights` maps caption
    sets to weights; sets that a record lacks are skipped. `templates` maps a set to templates with
    one "{}" each, such as "a photo of a {}"; the captions of a set without templates are not
    changed. `prefixes` maps a set to the text before its captions, such as a language ("<de>").
    """

    weights: Mapping[str, float]
    templates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prefixes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights.values()) < 0 or not sum(self.weights.values()):
            raise UserError(
                f"caption weights = {dict(self.weights)}; expected no weight below 0 and at least "
                "one above 0, such as {'name': 0.7, 'keywords': 0.3}"
            )
        if unused := sorted(set(self.prefixes) - set(self.weights)):
            raise UserError(
                f"prefixes for the caption sets {unused}, which have no weight in "
                f"{dict(self.weights)}; add their weights, or remove the prefixes"
            )
        for name, templates in self.templates.items():
            if name not in self.weights:
                raise UserError(
                    f"templates for the caption set {name!r}, which has no weight in "
                    f"{dict(self.weights)}; add its weight, or remove the templates"
                )
            if invalid := [t for t in templates if t.count("{}") != 1]:
                raise UserError(f"templates = {invalid}; expected one '{{}}' in each")

    def check(self, known: tuple[str, ...]) -> None:
        """Raise UserError if a weighted caption set is not in `known`, the sets of the source."""
        if unknown := sorted(set(self.weights) - set(known)):
            raise UserError(f"the source has no caption sets {unknown}; it has {known}")

    def __call__(self, record: Record, rng: np.random.Generator) -> PrefixedCaption:
        """Sample a caption of the record. Raises BadRecord if the record has none."""
        available = self._available_sets(record)
        weights = np.array([self.weights[name] for name in available], np.float64)
        name = available[int(rng.choice(len(available), p=weights / weights.sum()))]
        captions = record.captions[name]
        text = captions[int(rng.integers(len(captions)))]
        if templates := self.templates.get(name, ()):
            text = templates[int(rng.integers(len(templates)))].replace("{}", text)
        return PrefixedCaption(text, self.prefixes.get(name, ""))

    def first(self, record: Record) -> PrefixedCaption:
        """Return the first caption of the record's set with the largest weight, without a template.

        Evaluation uses this caption, since it is not random. Raises BadRecord if there is none.
        """
        name = max(self._available_sets(record), key=lambda name: self.weights[name])
        return PrefixedCaption(record.captions[name][0], self.prefixes.get(name, ""))

    def _available_sets(self, record: Record) -> list[str]:
        available = [
            name
            for name, weight in self.weights.items()
            if weight > 0 and record.captions.get(name)
        ]
        if not available:
            record.check("captions")  # if they could not be read, raises that fault instead
            raise BadRecord(
                FaultCause.MISSING_CAPTION,
                f"the record has no caption in the sets {sorted(self.weights)}; its sets are "
                f"{sorted(record.captions)}",
            )
        return available
