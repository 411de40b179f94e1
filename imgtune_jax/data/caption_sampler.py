"""Which of a record's captions a step sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from imgtune_jax.data.record import BadRecord, FaultCause, Record


class PrefixedCaption(NamedTuple):
    """A text, and the prompt in front of it that carries no loss."""

    text: str
    prefix: str = ""


@dataclass(frozen=True)
class CaptionSampler:
    """Draws a caption set by weight, one of its alternatives uniformly, and a template for it.

    `weights` maps caption sets to weights; the sets that a record lacks are left out of its draw.
    `templates` maps a set to prompts with one "{}" each ("a photo of a {}"); none means as it is.
    `prefixes` maps a set to what a captioner is told first, such as its language ("<de>").
    """

    weights: Mapping[str, float]
    templates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prefixes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights.values()) < 0 or not sum(self.weights.values()):
            raise ValueError(
                f"caption weights {dict(self.weights)}; wanted a weight above 0 for one set or "
                "more, such as {'name': 0.7, 'keywords': 0.3}"
            )
        if unused := sorted(set(self.prefixes) - set(self.weights)):
            raise ValueError(f"prefixes for {unused}, which have no weight in {self.weights}")
        for name, templates in self.templates.items():
            if name not in self.weights:
                raise ValueError(f"templates for {name!r}, which has no weight in {self.weights}")
            if wrong := [t for t in templates if t.count("{}") != 1]:
                raise ValueError(f"templates {wrong}: wanted one '{{}}' in each")

    def check(self, known: tuple[str, ...]) -> None:
        """Raise ValueError if a weighted set is none that the source can give."""
        if wrong := sorted(set(self.weights) - set(known)):
            raise ValueError(f"caption sets {wrong} are not given by the source; it gives {known}")

    def __call__(self, record: Record, rng: np.random.Generator) -> PrefixedCaption:
        """The caption of one step. Raises BadRecord when the record has none."""
        present = self._available_sets(record)
        weights = np.array([self.weights[name] for name in present], np.float64)
        name = present[int(rng.choice(len(present), p=weights / weights.sum()))]
        alternatives = record.captions[name]
        text = alternatives[int(rng.integers(len(alternatives)))]
        if templates := self.templates.get(name, ()):
            text = templates[int(rng.integers(len(templates)))].replace("{}", text)
        return PrefixedCaption(text, self.prefixes.get(name, ""))

    def first(self, record: Record) -> PrefixedCaption:
        """The first alternative of the heaviest set, without a template: what evaluation reads."""
        name = max(self._available_sets(record), key=lambda name: self.weights[name])
        return PrefixedCaption(record.captions[name][0], self.prefixes.get(name, ""))

    def _available_sets(self, record: Record) -> list[str]:
        present = [n for n, w in self.weights.items() if w > 0 and record.captions.get(n)]
        if not present:
            record.check("captions")
            raise BadRecord(
                FaultCause.MISSING_CAPTION,
                f"none of {sorted(self.weights)} is there; it has {sorted(record.captions)}",
            )
        return present
