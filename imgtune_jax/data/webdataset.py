"""WebDataset tars with random access: indexed once, and read in place without pickle."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from imgtune_jax.data.record import BadRecord, FaultCause, Record
from imgtune_jax.data.record_fields import (
    Fingerprint,
    RecordFields,
    as_field_path,
    decode_utf8,
    matches_filter,
    parse_captions,
    parse_json,
)
from imgtune_jax.data.tar_index import TarIndex, expand_braces, index_tar
from imgtune_jax.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
DEFAULT_CAPTION_FIELDS = ("caption", "text")
NO_MEMBER = -1


@dataclass(frozen=True)
class WebDataset:
    """WebDataset tars. Each image of each key is a record.

    A key is the name of a member up to the first dot of its file name; the extension is the rest
    after the dot. Field paths such as ("name", "en") refer to the key's JSON.

    `path`: a tar, a list of tars, or patterns with `*` and `{000..099}`.
    `image`: the extensions of images. A key without any of them is a record with a missing image.
    `captions`: caption set -> field path of a string or a list of strings. If None, the only
    caption set is "caption", from the `txt` member or from "caption" or "text" in the JSON.
    `label`: field path of an integer or, with `classes`, of a name in `classes`.
    `group`: field path; records with equal values have equal groups.
    `where`: top-level JSON field -> allowed values. Keys with any other value are skipped.
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
            raise UserError(
                f"no records in {self.path} (image={tuple(self.image)}, where={dict(self.where)})"
            )

    def __len__(self) -> int:
        return len(self._record_members)

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

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the options, names, sizes, and the bytes of about 16 members of each tar."""
        options = (self.image, self.captions, self.label, self.classes, self.group, self.where)
        digest = Fingerprint(*map(_canonical, options))
        for tar in self._tars:
            digest.add(tar.names, tar.sizes.tolist())
            spans = list(zip(tar.offsets.tolist(), tar.sizes.tolist(), strict=True))
            digest.add_samples(tar.path, spans)
        return digest.hex()

    @cached_property
    def _record_fields(self) -> RecordFields:
        return RecordFields(
            captions={name: as_field_path(path) for name, path in (self.captions or {}).items()},
            label=None if self.label is None else as_field_path(self.label),
            classes=self.classes,
            group=None if self.group is None else as_field_path(self.group),
        )

    @cached_property
    def _tars(self) -> tuple[TarIndex, ...]:
        return tuple(index_tar(path) for path in _expand_paths(self.path))

    @cached_property
    def _record_members(self) -> Int64[np.ndarray, "n 4"]:
        """(tar, image member, JSON member, txt member) of each record; NO_MEMBER if missing."""
        rows = []
        for t, tar in enumerate(self._tars):
            for members in _group_by_key(tar.names).values():
                if self.where and not self._is_selected(tar, members):
                    continue
                images = [members[e] for e in self.image if e in members] or [NO_MEMBER]
                texts = members.get("json", NO_MEMBER), members.get("txt", NO_MEMBER)
                rows += [(t, image, *texts) for image in images]
        return np.array(rows, np.int64).reshape(-1, 4)

    def _is_selected(self, tar: TarIndex, members: Mapping[str, int]) -> bool:
        """Return whether `where` selects a key.

        A key with unreadable JSON is selected, and becomes a bad record.
        """
        if "json" not in members:
            return False
        try:
            metadata = parse_json(tar.read(members["json"]), "json")
        except BadRecord:
            return True
        return matches_filter(metadata, self.where)

    def _build_record(self, index: int, *, with_image: bool) -> Record:
        t, image, json_member, txt = (int(x) for x in self._record_members[index])
        tar = self._tars[t]
        named_member = image if image != NO_MEMBER else max(json_member, txt)
        name = tar.names[named_member] if named_member != NO_MEMBER else f"record {index}"
        faults: dict[str, BadRecord] = {}
        if image == NO_MEMBER:
            detail = f"no {'|'.join(self.image)} member"
            faults["image"] = BadRecord(FaultCause.MISSING_IMAGE, detail)
        metadata: Mapping[str, Any] = {}
        captions: dict[str, tuple[str, ...]] | None = None  # None: those of `_record_fields`
        try:
            if json_member != NO_MEMBER:
                metadata = parse_json(tar.read(json_member), tar.names[json_member])
            if self.captions is None:
                captions = {"caption": _default_captions(tar, metadata, txt)}
        except BadRecord as bad:
            faults["captions"], captions = bad, {}
        return self._record_fields.build_record(
            f"{tar.path.name}:{name}",
            image=tar.read(image) if with_image and image != NO_MEMBER else None,
            metadata=metadata,
            faults=faults,
            captions=captions,
        )


def _default_captions(tar: TarIndex, metadata: Mapping[str, Any], txt: int) -> tuple[str, ...]:
    """Return the captions in the txt member or, without one, in the default JSON fields."""
    if txt != NO_MEMBER:
        return parse_captions(decode_utf8(tar.read(txt), tar.names[txt]))
    candidates = (parse_captions(metadata.get(name)) for name in DEFAULT_CAPTION_FIELDS)
    return next((captions for captions in candidates if captions), ())


def _canonical(value: Any) -> Any:
    """Convert mappings to sorted pairs, lists to tuples, so that equal options have equal reprs."""
    if isinstance(value, Mapping):
        return tuple((k, _canonical(value[k])) for k in sorted(value))
    if isinstance(value, list | tuple):
        return tuple(map(_canonical, value))
    return value


def _group_by_key(names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return {key: {extension: member}}; the extension follows the first dot of the file name."""
    keys: dict[str, dict[str, int]] = {}
    for member, name in enumerate(names):
        folder, slash, file = name.rpartition("/")
        stem, dot, extension = file.partition(".")
        if stem and dot:  # skips hidden files, such as macOS's ._name
            keys.setdefault(folder + slash + stem, {})[extension.lower()] = member
    return keys


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
