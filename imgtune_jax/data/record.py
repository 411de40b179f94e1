"""Records, what can be wrong with one, and how much of that is too much.

Web data is broken data. A broken record keeps its place in its batch, masked, and is counted by
cause; a run goes on until more than a stated share is broken.
"""

from __future__ import annotations

import enum
import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from imgtune_jax.errors import UserError

log = logging.getLogger("imgtune_jax.data")
MAX_LOGGED_PER_CAUSE = 5  # so many broken records of one cause are named in the log


class FaultCause(enum.StrEnum):
    """Why a record is broken."""

    MISSING_IMAGE = "missing_image"
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED_IMAGE = "truncated_image"
    UNDECODABLE_IMAGE = "undecodable_image"
    UNSUPPORTED_IMAGE = "unsupported_image"
    TOO_MANY_PIXELS = "too_many_pixels"
    MISSING_CAPTION = "missing_caption"
    BAD_UTF8 = "bad_utf8"
    BAD_METADATA = "bad_metadata"
    MISSING_LABEL = "missing_label"
    INVALID_FEATURES = "invalid_features"


class BadRecord(Exception):
    """One record cannot be used; `cause` says why in a word, `detail` in a sentence."""

    def __init__(self, cause: FaultCause, detail: str) -> None:
        super().__init__(cause, detail)
        self.cause = cause
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}"


class TooManyBadRecordsError(UserError):
    """More records are broken than the run allows."""


class Fault(NamedTuple):
    """A broken record, by name."""

    key: str
    cause: FaultCause
    detail: str


@dataclass(frozen=True)
class Record:
    """One example, as a source gives it.

    `image` is encoded bytes, a uint8 or uint16 array [h w], [h w 1], [h w 3] or [h w 4], a PIL
    image, or None. `captions` maps a caption set ("name", "keywords") to its alternatives. Records
    of equal `group` show the same thing, so any of the group's captions is right. `faults` says
    what could not be read ("image", "captions", "label", "group"): it matters only to who needs
    that part.
    """

    key: str
    image: Any = None
    captions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    label: int | None = None
    group: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    faults: Mapping[str, BadRecord] = field(default_factory=dict)

    def check(self, *parts: str) -> None:
        """Raise the BadRecord of the first of these parts that could not be read."""
        for part in parts:
            if part in self.faults:
                raise self.faults[part]


@runtime_checkable
class Source(Protocol):
    """Random access to records, in an order that does not change. Instances can be pickled.

    `fingerprint` is a digest of what the records are, cheap to make. A source may also have
    `describe(i)`, which is `[i]` without reading the image; `caption_sets`, the names of the sets
    it can give; and `has_group`.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...
    @property
    def fingerprint(self) -> str: ...


def read_metadata(source: Source, index: int) -> Record:
    """The record without its image, where the source can leave it unread."""
    reader = getattr(source, "describe", None)
    return source[index] if reader is None else reader(index)


def group_id(value: Any) -> int:
    """31 bits of a digest of a group's value, so that all sources agree without a common table.

    Two of n groups collide with a probability of about n² / 2³².
    """
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=4).digest()) >> 1


@dataclass
class BadRecordCounter:
    """Counts broken records by cause, names the first few, and says when there are too many.

    Too many: a larger share than `max_bad_fraction` once `max_bad_fraction_after` have been seen.
    """

    max_bad_fraction: float = 0.1
    max_bad_fraction_after: int = 1000
    seen: int = 0
    counts: dict[FaultCause, int] = field(default_factory=dict)
    examples: dict[FaultCause, list[str]] = field(default_factory=dict)

    def add(self, seen: int, faults: Iterable[Fault]) -> None:
        """Count `seen` more records, of which `faults` are broken.

        Raises TooManyBadRecords when the cap is passed.
        """
        self.seen += seen
        for fault in faults:
            self.counts[fault.cause] = self.counts.get(fault.cause, 0) + 1
            examples = self.examples.setdefault(fault.cause, [])
            if len(examples) < MAX_LOGGED_PER_CAUSE and fault.key not in examples:
                examples.append(fault.key)
                log.warning("broken record %s: %s: %s", *fault)
                if len(examples) == MAX_LOGGED_PER_CAUSE:
                    log.warning("further records with %s are counted, not named", fault.cause)
        self._check()

    @property
    def bad(self) -> int:
        """The number of broken records, of every cause."""
        return sum(self.counts.values())

    def summary(self) -> dict[str, int]:
        """{"seen": n, cause: count, …}, ready for JSON."""
        return {"seen": self.seen, **{str(c): n for c, n in sorted(self.counts.items())}}

    def _check(self) -> None:
        if self.seen < self.max_bad_fraction_after or self.bad <= self.max_bad_fraction * self.seen:
            return
        causes = "; ".join(
            f"{n} {cause} (such as {', '.join(self.examples[cause])})"
            for cause, n in sorted(self.counts.items(), key=lambda item: -item[1])
        )
        raise TooManyBadRecordsError(
            f"{self.bad} of {self.seen} records are broken ({self.bad / self.seen:.1%}, allowed "
            f"{self.max_bad_fraction:.1%}): {causes}. Repair the data, or raise max_bad_fraction"
        )
