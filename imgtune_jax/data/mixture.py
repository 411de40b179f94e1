"""Several sources as one, in exact proportions."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from imgtune_jax.data.fingerprint import Fingerprint
from imgtune_jax.data.record import (
    Record,
    Source,
    class_names,
    listing_fingerprint,
    read_metadata,
)
from imgtune_jax.errors import UserError


@dataclass(frozen=True)
class Mixture:
    """The records of `sources`, in the proportions `weights` (by default, their lengths).

    An epoch is as short as possible while it contains every record of every source. Source k fills
    the fraction weights[k] / sum(weights) of an epoch, rounded to a whole record. A source with
    fewer records repeats from its beginning. Nothing is random: record i is the
    same in every epoch.
    """

    sources: Sequence[Source]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))  # it may be a generator
        if not self.sources:
            raise UserError("a mixture has no sources; set `sources` to one or more")
        weights = self.weights
        if weights is not None and (
            len(weights) != len(self.sources) or not all(0 < w < math.inf for w in weights)
        ):
            raise UserError(
                f"weights = {tuple(weights)}; expected {len(self.sources)} weights above 0 "
                "and finite, one per source"
            )

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of records of an epoch that come from each source."""
        lengths = [len(s) for s in self.sources]
        weights = self.weights or lengths
        scale = max(n / w for n, w in zip(lengths, weights, strict=True))
        # The maximum ensures that a rounding error drops no record of the source that sets `scale`.
        return tuple(max(n, round(scale * w)) for n, w in zip(lengths, weights, strict=True))

    @cached_property
    def _cumulative_counts(self) -> list[int]:
        return [sum(self.counts[: k + 1]) for k in range(len(self.counts))]

    def locate(self, index: int) -> tuple[int, int]:
        """Return (source index, index in that source) of a record of the mixture."""
        if not 0 <= index < len(self):
            raise IndexError(f"index = {index}; expected 0 <= index < {len(self)}")
        k = bisect.bisect_right(self._cumulative_counts, index)
        first = self._cumulative_counts[k] - self.counts[k]
        return k, (index - first) % len(self.sources[k])

    def __len__(self) -> int:
        return self._cumulative_counts[-1]

    def __getitem__(self, index: int) -> Record:
        k, i = self.locate(index)
        return self.sources[k][i]

    def read_metadata(self, index: int) -> Record:
        """Return the record, without its image if its source can skip reading it."""
        k, i = self.locate(index)
        return read_metadata(self.sources[k], i)

    @property
    def caption_sets(self) -> tuple[str, ...]:
        """Names of the caption sets that records of any source may have."""
        set_names: list[Any] = [getattr(s, "caption_sets", ()) for s in self.sources]
        return tuple(dict.fromkeys(name for names in set_names for name in names))

    @property
    def has_group(self) -> bool:
        """Whether the records of all sources have groups."""
        return all(getattr(s, "has_group", False) for s in self.sources)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels.

        Raises UserError if one label means different classes in two sources.
        """
        by_source = [class_names(s) for s in self.sources]
        longest = max(by_source, key=len)
        for names in by_source:
            if names != longest[: len(names)]:
                raise UserError(
                    f"the sources of a mixture have the classes {longest[:8]} and {names[:8]}, so "
                    "equal labels mean different classes; set `classes` of every source to one list"
                )
        return longest

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the fingerprints of the sources and of the proportions."""
        return Fingerprint([s.fingerprint for s in self.sources], self.counts).hex()

    @cached_property
    def listing_fingerprint(self) -> str:
        """Digest of the lists of records of the sources and of the proportions."""
        return Fingerprint([listing_fingerprint(s) for s in self.sources], self.counts).hex()
