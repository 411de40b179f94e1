"""A subset of a source's records, and evenly spaced indices."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from imgtune_jax.data.record import Record, Source, class_names, read_metadata


@dataclass(frozen=True)
class Subset:
    """A source of the records `indices` of another source, in that order."""

    source: Source
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[self.indices[index]]

    def read_metadata(self, index: int) -> Record:
        """Return the record, without its image if the source can skip reading it."""
        return read_metadata(self.source, self.indices[index])

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        return class_names(self.source)

    @property
    def fingerprint(self) -> str:
        """Digest of the source and of the indices."""
        indices_digest = hashlib.sha256(repr(self.indices).encode()).hexdigest()
        return f"{self.source.fingerprint} {indices_digest[:24]}"


def evenly_spaced(n: int, limit: int | None) -> tuple[int, ...]:
    """Return `limit` evenly spaced indices of range(n), or all if `limit` is None or above n."""
    count = n if limit is None else min(n, limit)
    return tuple(i * n // count for i in range(count))
