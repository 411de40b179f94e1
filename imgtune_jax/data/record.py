"""Records, the faults of bad records, and the limit on the number of bad records.

Data from the web contains bad records, which cannot be read or decoded. A bad record keeps its row
in the batch, masked, and is counted by cause. A run stops when too many of its records are bad.
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
MAX_LOGGED_PER_CAUSE = 5  # the log names this many bad records per cause


class FaultCause(enum.StrEnum):
    """The reason that a record is bad."""

    MISSING_IMAGE = "missing_image"
    UNREADABLE_FILE = "unreadable_file"
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


def printable(text: str) -> str:
    """Return a text that can be printed: bytes that are not UTF-8 are written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class BadRecord(Exception):
    """A record that cannot be used: `cause` classifies the reason, `detail` explains it."""

    def __init__(self, cause: FaultCause, detail: str) -> None:
        detail = printable(detail)
        super().__init__(cause, detail)
        self.cause = cause
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}"


class TooManyBadRecordsError(UserError):
    """The fraction of bad records exceeds the limit of the run."""


class Fault(NamedTuple):
    """The key of a bad record and the reason that it is bad."""

    key: str
    cause: FaultCause
    detail: str


@dataclass(frozen=True)
class Record:
    """One example of a source.

    `image` is encoded bytes, a uint8 or uint16 array [h w], [h w 1], [h w 3] or [h w 4], a PIL
    image, or None. `captions` maps caption sets (such as "name" and "keywords") to captions, each
    of which describes the image. Records with equal `group` show the same thing, so each caption of
    the group is a positive for each image of the group. `faults` maps a field that could not be
    read ("image", "captions", "label", "group") to the reason; a record with a fault is bad only
    for users of that field.
    """

    key: str
    image: Any = None
    captions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    label: int | None = None
    group: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    faults: Mapping[str, BadRecord] = field(default_factory=dict)

    def check(self, *fields: str) -> None:
        """Raise the BadRecord of the first of `fields` that could not be read, if there is one."""
        for name in fields:
            if name in self.faults:
                raise self.faults[name]


@runtime_checkable
class Source(Protocol):
    """Random access to records in a fixed order. Instances can be pickled.

    `fingerprint` changes when a record does. A source may also have `listing_fingerprint`, which a
    copy of the source shares (see `fingerprint.py`); `read_metadata(i)`, which returns record i
    without reading its image; `caption_sets`, the names of the caption sets that its records may
    have; `has_group`, whether its records have groups; and `class_names`, the names of the classes
    in the order of the labels.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...
    @property
    def fingerprint(self) -> str: ...


def read_metadata(source: Source, index: int) -> Record:
    """Return a record, without its image if the source can skip reading it."""
    reader = getattr(source, "read_metadata", None)
    return source[index] if reader is None else reader(index)


def class_names(source: Source | None) -> tuple[str, ...]:
    """Return the names of a source's classes, in the order of the labels; () if it has no names."""
    return tuple(getattr(source, "class_names", ()))


def listing_fingerprint(source: Source) -> str:
    """Return the digest of a source's list of records; by default, its fingerprint."""
    digest = getattr(source, "listing_fingerprint", None)
    return source.fingerprint if digest is None else digest


def group_id(value: Any) -> int:
    """Return the id of a group: 31 bits of the digest of its value.

    Equal values have equal ids in all sources. The probability that any two of n groups have the
    same id is about n² / 2³².
    """
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=4).digest()) >> 1


@dataclass
class BadRecordCounter:
    """Count bad records by cause, log the first few, and raise an error above a limit.

    The limit is the fraction `max_bad_fraction` of the records. It is checked from
    `max_bad_fraction_after` records on. `seen` counts all records, bad or not.
    """

    max_bad_fraction: float = 0.1
    max_bad_fraction_after: int = 1000
    seen: int = 0
    counts: dict[FaultCause, int] = field(default_factory=dict)
    examples: dict[FaultCause, list[str]] = field(default_factory=dict)

    @classmethod
    def from_summary(
        cls, summary: Mapping[str, int], max_bad_fraction: float, max_bad_fraction_after: int
    ) -> BadRecordCounter:
        """Return a counter that continues from the counts that `summary` returned."""
        counts = {FaultCause(cause): n for cause, n in summary.items() if cause != "seen"}
        seen = summary.get("seen", 0)
        return cls(max_bad_fraction, max_bad_fraction_after, seen=seen, counts=counts)

    def add(self, seen: int, faults: Iterable[Fault]) -> None:
        """Count `seen` more records, of which `faults` are bad.

        Raises TooManyBadRecordsError if the fraction of bad records is above the limit.
        """
        self.seen += seen
        for fault in faults:
            self.counts[fault.cause] = self.counts.get(fault.cause, 0) + 1
            examples = self.examples.setdefault(fault.cause, [])
            if len(examples) < MAX_LOGGED_PER_CAUSE and fault.key not in examples:
                examples.append(fault.key)
                log.warning("bad record %s: %s: %s", *fault)
                if len(examples) == MAX_LOGGED_PER_CAUSE:
                    log.warning("more records with %s are counted, not logged", fault.cause)
        self._check_limit()

    @property
    def bad(self) -> int:
        """Number of bad records, of all causes."""
        return sum(self.counts.values())

    def summary(self) -> dict[str, int]:
        """Return {"seen": number of records, cause: number of bad records, …}, ready for JSON."""
        return {"seen": self.seen, **{str(cause): n for cause, n in sorted(self.counts.items())}}

    def _format_examples(self, cause: FaultCause) -> str:
        examples = self.examples.get(cause)  # None if an earlier process counted all of them
        return f" (such as {', '.join(examples)})" if examples else ""

    def _check_limit(self) -> None:
        if self.seen < self.max_bad_fraction_after or self.bad <= self.max_bad_fraction * self.seen:
            return
        causes = "; ".join(
            f"{n} {cause}{self._format_examples(cause)}"
            for cause, n in sorted(self.counts.items(), key=lambda item: -item[1])
        )
        raise TooManyBadRecordsError(
            f"{self.bad} of {self.seen} records are bad ({self.bad / self.seen:.1%}, allowed "
            f"{self.max_bad_fraction:.1%}): {causes}. Repair the data, or raise max_bad_fraction"
        )
