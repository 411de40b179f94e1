"""WebDataset tars with random access: indexed once, read in place, never executed."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from imgtune_jax.data import record_fields
from imgtune_jax.data.record import BadRecord, FaultCause, Record
from imgtune_jax.data.tar_index import TarIndex, expand_braces, index_tar

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
DEFAULT_CAPTION_FIELDS = ("caption", "text")
NO_MEMBER = -1


@dataclass(frozen=True)
class WebDataset:
    """Each image of each key is a record.

    path: a tar, a list of tars, or patterns with `*` and `{000..099}`. image: the extensions that
    are images (what follows the first dot of a name); a key without any is a record whose image is
    missing. captions: set -> field path in the key's JSON, ("name", "en") say, whose value is a
    string or a list of alternatives; without it there is one set, "caption", from the `txt` member
    or the JSON's "caption" or "text". label: field path of an integer, or of a name in `classes`.
    group: field path; equal values, equal group. where: keep the keys whose JSON has, for each of
    these top-level fields, one of the values.
    """

    path: str | Sequence[str]
    image: Sequence[str] = IMAGE_EXTENSIONS
    captions: Mapping[str, Sequence[str]] | None = None
    label: Sequence[str] | None = None
    classes: Sequence[str] | None = None
    group: Sequence[str] | None = None
    where: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self):
            raise ValueError(
                f"no records in {self.path} (image={tuple(self.image)}, where={dict(self.where)})"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return self._record(index, with_image=True)

    def describe(self, index: int) -> Record:
        """The record without its image."""
        return self._record(index, with_image=False)

    @property
    def caption_sets(self) -> tuple[str, ...]:
        """The caption sets that records may have."""
        return ("caption",) if self.captions is None else tuple(self.captions)

    @property
    def has_group(self) -> bool:
        """Do records have a group?"""
        return self.group is not None

    @cached_property
    def fingerprint(self) -> str:
        """Digest of options, names, sizes, and the bytes of a few members of each tar."""
        options = (self.image, self.captions, self.label, self.classes, self.group, self.where)
        digest = record_fields.Fingerprint(*map(_plain, options))
        for tar in self._tars:
            digest.add(tar.names, tar.sizes.tolist())
            spans = list(zip(tar.offsets.tolist(), tar.sizes.tolist(), strict=True))
            digest.add_samples(tar.path, spans)
        return digest.hex()

    @cached_property
    def _tars(self) -> tuple[TarIndex, ...]:
        return tuple(index_tar(path) for path in _expand_paths(self.path))

    @cached_property
    def _rows(self) -> Int64[np.ndarray, "n 4"]:
        """(tar, image member, json member, txt member) of each record; NONE where there is none."""
        rows = []
        for t, tar in enumerate(self._tars):
            for members in _by_key(tar.names).values():
                if self.where and not self._is_selected(tar, members):
                    continue
                images = [members[e] for e in self.image if e in members] or [NO_MEMBER]
                texts = members.get("json", NO_MEMBER), members.get("txt", NO_MEMBER)
                rows += [(t, image, *texts) for image in images]
        return np.array(rows, np.int64).reshape(-1, 4)

    def _is_selected(self, tar: TarIndex, members: Mapping[str, int]) -> bool:
        """A key whose JSON cannot be read stays in: its record says why it is broken."""
        if "json" not in members:
            return False
        try:
            metadata = record_fields.parse_json(tar.read(members["json"]), "json")
        except BadRecord:
            return True
        return record_fields.matches_filter(metadata, self.where)

    def _record(self, index: int, *, with_image: bool) -> Record:
        t, image, json_member, txt = (int(x) for x in self._rows[index])
        tar = self._tars[t]
        named = image if image != NO_MEMBER else max(json_member, txt)
        name = tar.names[named] if named != NO_MEMBER else f"record {index}"
        faults: dict[str, BadRecord] = {}
        if image == NO_MEMBER:
            faults["image"] = BadRecord(
                FaultCause.MISSING_IMAGE, f"no {'|'.join(self.image)} member"
            )
        metadata: Mapping[str, Any] = {}
        captions: dict[str, tuple[str, ...]] = {}
        try:
            if json_member != NO_MEMBER:
                metadata = record_fields.parse_json(tar.read(json_member), tar.names[json_member])
            captions = self._captions(tar, metadata, txt)
        except BadRecord as bad:
            faults["captions"] = bad
        label, group = None, None
        try:
            if self.label is not None:
                found = record_fields.get_field(metadata, record_fields.as_field_path(self.label))
                label = record_fields.parse_label(found, self.classes)
        except BadRecord as bad:
            faults["label"] = bad
        try:
            if self.group is not None:
                group = record_fields.parse_group(
                    record_fields.get_field(metadata, record_fields.as_field_path(self.group))
                )
        except BadRecord as bad:
            faults["group"] = bad
        data = tar.read(image) if with_image and image != NO_MEMBER else None
        key = f"{tar.path.name}:{name}"
        return Record(key, data, captions, label, group, metadata, faults)

    def _captions(
        self, tar: TarIndex, metadata: Mapping[str, Any], txt: int
    ) -> dict[str, tuple[str, ...]]:
        if self.captions is not None:
            return {
                name: record_fields.parse_captions(
                    record_fields.get_field(metadata, record_fields.as_field_path(path))
                )
                for name, path in self.captions.items()
            }
        if txt != NO_MEMBER:
            return {
                "caption": record_fields.parse_captions(
                    record_fields.decode_utf8(tar.read(txt), tar.names[txt])
                )
            }
        found = (
            record_fields.parse_captions(metadata.get(name)) for name in DEFAULT_CAPTION_FIELDS
        )
        return {"caption": next((f for f in found if f), ())}


def _plain(value: Any) -> Any:
    """Mappings as sorted pairs and sequences as tuples, so that equal options read equal."""
    if isinstance(value, Mapping):
        return tuple((k, _plain(value[k])) for k in sorted(value))
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value


def _by_key(names: Sequence[str]) -> dict[str, dict[str, int]]:
    """{key: {extension: member}}; the extension begins after the first dot of the file's name."""
    keys: dict[str, dict[str, int]] = {}
    for member, name in enumerate(names):
        folder, slash, file = name.rpartition("/")
        stem, dot, extension = file.partition(".")
        if stem and dot:  # no hidden files, such as macOS's ._name
            keys.setdefault(folder + slash + stem, {})[extension.lower()] = member
    return keys


def _expand_paths(path: str | Sequence[str]) -> list[Path]:
    """The tars of a path, list or pattern. Raises ValueError naming what is not there."""
    patterns = [path] if isinstance(path, str | Path) else list(path)
    found: list[Path] = []
    for pattern in (p for given in patterns for p in expand_braces(str(given))):
        if "://" in pattern:
            raise ValueError(f"{pattern}: only local files are read; copy or mount it first")
        matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        missing = [m for m in matches if not Path(m).is_file()]
        if not matches or missing:
            raise ValueError(f"no tar at {pattern!r}; give a path, or a pattern with * or {{0..9}}")
        found += map(Path, matches)
    if not found:
        raise ValueError("webdataset has no path; give a tar, a list of tars or a pattern")
    return found
