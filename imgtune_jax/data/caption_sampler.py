"""Sampling of one caption of a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from imgtune_jax.data.record import BadRecord, FaultCause, Record


class PrefixedCaption(NamedTuple):
    """A caption, and the prefix before it on which there is no loss."""

    text: str
    prefix: str = ""


@dataclass(frozen=True)
class CaptionSampler:
    """Sample a caption set by weight, then one of its alternatives and of its templates uniformly.

    `weights` maps caption sets to weights; a set that a record lacks is not sampled for it.
    `templates` maps a set to templates with one "{}" each ("a photo of a {}"); without templates,
    the caption is unchanged. `prefixes` maps a set to the text before its captions, such as the
    language that a captioner is to generate ("<de>").
    """

    weights: Mapping[str, float]
    templates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prefixes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights.values()) < 0 or not sum(self.weights.values()):
            raise ValueError(
                f"caption weights = {dict(self.weights)}; expected a weight above 0 for one set "
                "or more, such as {'name': 0.7, 'keywords': 0.3}"
            )
        if unused := sorted(set(self.prefixes) - set(self.weights)):
            raise ValueError(
                f"prefixes for {unused}, which have no weight in {self.weights}; set one, or "
                "remove them"
            )
        for name, templates in self.templates.items():
            if name not in self.weights:
                raise ValueError(
                    f"templates for {name!r}, which has no weight in {self.weights}; set one, or "
                    "remove them"
                )
            if invalid := [t for t in templates if t.count("{}") != 1]:
                raise ValueError(f"templates = {invalid}; expected one '{{}}' in each")

    def check(self, known: tuple[str, ...]) -> None:
        """Raise ValueError unless all weighted caption sets are in `known`, those of the source."""
        if unknown := sorted(set(self.weights) - set(known)):
            raise ValueError(f"the source has no caption sets {unknown}; it has {known}")

    def __call__(self, record: Record, rng: np.random.Generator) -> PrefixedCaption:
        """Sample a caption of the record. Raises BadRecord if it has none."""
        available = self._available_sets(record)
        weights = np.array([self.weights[name] for name in available], np.float64)
        name = available[int(rng.choice(len(available), p=weights / weights.sum()))]
        alternatives = record.captions[name]
        text = alternatives[int(rng.integers(len(alternatives)))]
        if templates := self.templates.get(name, ()):
            text = templates[int(rng.integers(len(templates)))].replace("{}", text)
        return PrefixedCaption(text, self.prefixes.get(name, ""))

    def first(self, record: Record) -> PrefixedCaption:
        """Return the first alternative of the set with the largest weight, without a template.

        Evaluation uses it. Raises BadRecord if the record has no caption.
        """
        name = max(self._available_sets(record), key=lambda name: self.weights[name])
        return PrefixedCaption(record.captions[name][0], self.prefixes.get(name, ""))

    def _available_sets(self, record: Record) -> list[str]:
        available = [n for n, w in self.weights.items() if w > 0 and record.captions.get(n)]
        if not available:
            record.check("captions")
            raise BadRecord(
                FaultCause.MISSING_CAPTION,
                f"the record has captions in none of {sorted(self.weights)}; its caption sets are "
                f"{sorted(record.captions)}",
            )
        return available
