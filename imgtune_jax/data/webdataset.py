"""WebDataset tars with random access: indexed once, and read in place without pickle."""

from __future__ import annotations

import glob
import logging
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from imgtune_jax.data import fingerprint as fingerprint_lib
from imgtune_jax.data.fingerprint import Fingerprint
from imgtune_jax.data.hidden import is_hidden
from imgtune_jax.data.image import MAX_FILE_BYTES
from imgtune_jax.data.record import BadRecord, FaultCause, Record
from imgtune_jax.data.record_fields import (
    RecordFields,
    as_field_path,
    as_int_if_digits,
    decode_text,
    matches_filter,
    parse_captions,
    parse_json,
)
from imgtune_jax.data.tar_index import TarIndex, expand_braces, index_tar
from imgtune_jax.errors import UserError

log = logging.getLogger("imgtune_jax.data")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
DEFAULT_CAPTION_FIELDS = ("caption", "text")
MAX_TEXT_BYTES = 1 << 24  # of a txt, json or cls member
NO_MEMBER = -1


class _Records(NamedTuple):
    """Members of each record: (tar, image, JSON, txt, cls), or NO_MEMBER.

    `without_image` maps the index of a record without an image to its {extension: member}.
    """

    members: Int64[np.ndarray, "n 5"]
    without_image: Mapping[int, Mapping[str, int]]


@dataclass(frozen=True)
class WebDataset:
    """WebDataset tars. Each image of each key is a record.

    A key is the name of a member up to the first dot of its file name; the extension is the rest
    after the dot. If a key has an extension again, the further member begins another record. Hidden
    members are skipped. Field paths such as ("name", "en") refer to the key's JSON.

    `path`: a tar, a list of tars, or patterns with `*` and `{000..099}`.
    `image`: the extensions of images. A key without any of them is a record with a missing image.
    `captions`: caption set -> field path of a string or a list of strings. If None, the only
    caption set is "caption", from the `txt` member or from "caption" or "text" in the JSON.
    `label`: field path of an integer or, with `classes`, of a name in `classes`. If None, the label
    is the integer in the `cls` member, as in CLIP_benchmark's tars.
    `group`: field path; records with equal values have equal groups.
    `where`: top-level JSON field -> allowed values. Keys with any other value are skipped.
    `fingerprint_mode`: "stat" or "content"; see `fingerprint.py`.
    """

    path: str | Sequence[str]
    image: Sequence[str] = IMAGE_EXTENSIONS
    captions: Mapping[str, Sequence[str]] | None = None
    label: Sequence[str] | None = None
    classes: Sequence[str] | None = None
    group: Sequence[str] | None = None
    where: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    fingerprint_mode: str = fingerprint_lib.STAT

    def __post_init__(self) -> None:
        fingerprint_lib.check_mode(self.fingerprint_mode)
        if not len(self):
            raise UserError(
                f"no records in {self.path} (image={self._extensions}, where={dict(self.where)})"
            )
        if len(self._records.without_image) == len(self):
            fault = self[0].faults["image"]
            raise UserError(f"no images in {self.path}: {fault.detail}")

    def __len__(self) -> int:
        return len(self._records.members)

    def __getitem__(self, index: int) -> Record:
        return self._build_record(index, with_image=True)

    def read_metadata(self, index: int) -> Record:
        """Return the record without its image."""
        return self._build_record(index, with_image=False)

    @property
    def caption_sets(self) -> tuple[str, ...]:
        """Names of the caption sets that records may have."""
        return ("caption",) if self.captions is None else tuple(self.captions)

    @property
    def has_group(self) -> bool:
        """Whether records have a group."""
        return self.group is not None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels; () without `classes`."""
        return tuple(self.classes or ())

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the records, and of the size and modification time of each tar."""
        if self.fingerprint_mode == fingerprint_lib.CONTENT:
            return self.listing_fingerprint
        tars = [tar.path for tar in self._tars]
        return fingerprint_lib.with_file_stats(self.listing_fingerprint, tars)

    @cached_property
    def listing_fingerprint(self) -> str:
        """Digest of the options, names, sizes, and the bytes of about 16 members of each tar.

        With the mode "content", of all bytes of each tar.
        """
        options = (self.image, self.captions, self.label, self.classes, self.group, self.where)
        digest = Fingerprint(*map(_canonical, options))
        for tar in self._tars:
            digest.add(tar.names, tar.sizes.tolist())
            if self.fingerprint_mode == fingerprint_lib.CONTENT:
                digest.add_content(tar.path)
                continue
            spans = zip(tar.offsets.tolist(), tar.sizes.tolist(), strict=True)
            digest.add_samples(tar.path, [(start, size) for start, size in spans if start >= 0])
        return digest.hex()

    @property
    def _extensions(self) -> tuple[str, ...]:
        return tuple(e.lower().removeprefix(".") for e in as_field_path(self.image))

    @cached_property
    def _record_fields(self) -> RecordFields:
        label = None if self.label is None else as_field_path(self.label)
        if label is None and (self._records.members[:, -1] != NO_MEMBER).any():
            label = ("cls",)
        return RecordFields(
            captions={name: as_field_path(path) for name, path in (self.captions or {}).items()},
            label=label,
            classes=None if self.label is None else self.classes,  # `cls` is the index of a class
            group=None if self.group is None else as_field_path(self.group),
        )

    @cached_property
    def _tars(self) -> tuple[TarIndex, ...]:
        return tuple(index_tar(path) for path in _expand_paths(self.path))

    @cached_property
    def _records(self) -> _Records:
        rows, without_image = [], {}
        for t, tar in enumerate(self._tars):
            for members in _group_by_key(tar):
                if self.where and not self._is_selected(tar, members):
                    continue
                images = [members[e] for e in self._extensions if e in members]
                if not images:
                    without_image[len(rows)] = members
                texts = [members.get(e, NO_MEMBER) for e in ("json", "txt", "cls")]
                rows += [(t, image, *texts) for image in images or [NO_MEMBER]]
        return _Records(np.array(rows, np.int64).reshape(-1, 5), without_image)

    def _is_selected(self, tar: TarIndex, members: Mapping[str, int]) -> bool:
        """Return whether `where` selects a key.

        A key with unreadable JSON is selected, and becomes a bad record.
        """
        if "json" not in members:
            return False
        try:
            metadata = parse_json(_read_text(tar, members["json"]), "json")
        except BadRecord:
            return True
        return matches_filter(metadata, self.where)

    def _build_record(self, index: int, *, with_image: bool) -> Record:
        t, image, json_member, txt, cls = (int(x) for x in self._records.members[index])
        tar, faults, data = self._tars[t], {}, None
        if image == NO_MEMBER:
            members = self._records.without_image[index]
            name = tar.names[next(iter(members.values()))]
            faults["image"] = self._missing_image(name, tuple(members))
        else:
            name = tar.names[image]
            try:
                data = tar.read(image, max_bytes=MAX_FILE_BYTES) if with_image else None
            except BadRecord as bad:
                faults["image"] = bad
        metadata: Mapping[str, Any] = {}
        captions: dict[str, tuple[str, ...]] | None = None  # None: those of `_record_fields`
        try:
            if json_member != NO_MEMBER:
                metadata = parse_json(_read_text(tar, json_member), tar.names[json_member])
            if self.captions is None:
                captions = {"caption": _default_captions(tar, metadata, txt)}
        except BadRecord as bad:
            faults["captions"], captions = bad, {}
        try:
            if self.label is None and cls != NO_MEMBER:
                metadata = {**metadata, "cls": as_int_if_digits(_read_text(tar, cls))}
        except BadRecord as bad:
            faults["label"] = bad
        return self._record_fields.build_record(
            f"{tar.path.name}:{name}",
            image=data,
            metadata=metadata,
            faults=faults,
            captions=captions,
        )

    def _missing_image(self, name: str, extensions: Sequence[str]) -> BadRecord:
        return BadRecord(
            FaultCause.MISSING_IMAGE,
            f"the key of {name} has the extensions {', '.join(extensions)}, and none of the image "
            f"extensions {', '.join(self._extensions)}. An extension begins after the first dot of "
            "the file name; rename the members, or set `image`",
        )


def _read_text(tar: TarIndex, member: int) -> str:
    return decode_text(tar.read(member, max_bytes=MAX_TEXT_BYTES), tar.names[member])


def _default_captions(tar: TarIndex, metadata: Mapping[str, Any], txt: int) -> tuple[str, ...]:
    """Return the captions in the txt member or, without one, in the default JSON fields."""
    if txt != NO_MEMBER:
        return parse_captions(_read_text(tar, txt))
    candidates = (parse_captions(metadata.get(name)) for name in DEFAULT_CAPTION_FIELDS)
    return next((captions for captions in candidates if captions), ())


def _canonical(value: Any) -> Any:
    """Convert mappings to sorted pairs, lists to tuples, so that equal options have equal reprs."""
    if isinstance(value, Mapping):
        return tuple((k, _canonical(value[k])) for k in sorted(value))
    if isinstance(value, list | tuple):
        return tuple(map(_canonical, value))
    return value


def _group_by_key(tar: TarIndex) -> list[dict[str, int]]:
    """Return {extension: member} of each sample of a tar, in the order of their first members.

    A member whose key has its extension already begins another sample.
    """
    samples: list[dict[str, int]] = []
    newest: dict[str, dict[str, int]] = {}  # by key
    for member, name in enumerate(tar.names):
        if name.startswith(".") or any(part in name for part in ("/.", "//", "__MACOSX")):
            name = posixpath.normpath(name)  # ./1.jpg and 1.txt have the same key
            if is_hidden(name):
                continue
        folder, slash, file = name.rpartition("/")
        stem, dot, extension = file.partition(".")
        if not (stem and dot):
            continue
        key, extension = folder + slash + stem, extension.lower()
        if key not in newest or extension in newest[key]:
            newest[key] = {}
            samples.append(newest[key])
        newest[key][extension] = member
    if repeated := len(samples) - len(newest):
        log.warning(
            "%s has the same key several times; %d further records of such keys are used too",
            tar.path, repeated,
        )  # fmt: skip
    return samples


def _expand_paths(path: str | Sequence[str]) -> list[Path]:
    """Return the tars of a path, list or pattern; an existing path is not a pattern.

    Raises UserError if a tar is missing.
    """
    paths = [str(p) for p in ([path] if isinstance(path, str | Path) else path)]
    tars: list[Path] = []
    for pattern in (x for p in paths for x in ([p] if Path(p).exists() else expand_braces(p))):
        if "://" in pattern:
            raise UserError(
                f"path = {pattern!r}; expected a local path: copy or mount the files first"
            )
        is_pattern = glob.has_magic(pattern) and not Path(pattern).exists()
        matches = sorted(glob.glob(pattern)) if is_pattern else [pattern]
        missing = [m for m in matches if not Path(m).is_file()]
        if not matches or missing:
            raise UserError(
                f"no tar at {pattern!r}; set path to a tar, or to a pattern with * or {{0..9}}"
            )
        tars += map(Path, matches)
    if not tars:
        raise UserError("webdataset has no path; set it to a tar, a list of tars or a pattern")
    return tars
