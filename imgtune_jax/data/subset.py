"""Some records of a source."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from imgtune_jax.data import Record, Source, read_metadata


@dataclass(frozen=True)
class Subset:
    """The records `indices` of a source, in that order, as a source."""

    source: Source
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[self.indices[index]]

    def describe(self, index: int) -> Record:
        """The record without its image, where the source can leave it unread."""
        return read_metadata(self.source, self.indices[index])

    @property
    def fingerprint(self) -> str:
        """Digest of the source and of what is chosen of it."""
        which = hashlib.sha256(repr(self.indices).encode()).hexdigest()
        return f"{self.source.fingerprint} {which[:24]}"


def evenly_spaced(n: int, limit: int | None) -> tuple[int, ...]:
    """`limit` of n places, evenly apart; all of them if there are no more, or limit is None."""
    k = n if limit is None else min(n, limit)
    return tuple(i * n // k for i in range(k))
