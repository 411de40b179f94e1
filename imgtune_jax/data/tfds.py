"""TensorFlow Datasets (TFDS) in the ArrayRecord format, read without TensorFlow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from imgtune_jax.data import fingerprint as fingerprint_lib
from imgtune_jax.data.fingerprint import Fingerprint
from imgtune_jax.data.record import BadRecord, FaultCause, Record
from imgtune_jax.data.record_fields import (
    RecordFields,
    as_field_path,
    decode_text,
    get_field,
    parse_captions,
)
from imgtune_jax.errors import UserError


@dataclass(frozen=True)
class TFDS:
    """A prepared TFDS data set.

    `dataset` is its name, optionally with a version ("coco_captions/2014:1.1.0").

    `image`, `label` and `group` are paths of features, such as ("captions", "text"); `captions`
    maps caption sets to such paths. A feature may be a list of captions. The data must be in
    `data_dir` in the format array_record, which `tfds build --file_format=array_record` writes.
    `fingerprint_mode` is "stat" or "content"; see `fingerprint.py`.
    """

    dataset: str
    split: str = "train"
    data_dir: str | None = None
    image: Sequence[str] = ("image",)
    captions: Mapping[str, Sequence[str]] | None = None
    label: Sequence[str] | None = None
    group: Sequence[str] | None = None
    fingerprint_mode: str = fingerprint_lib.STAT

    def __post_init__(self) -> None:
        fingerprint_lib.check_mode(self.fingerprint_mode)
        if not len(self):
            raise UserError(f"{self.dataset}, split {self.split!r}, has no records")

    def __len__(self) -> int:
        return len(self._data_source)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"index = {index}; expected 0 <= index < {len(self)}")
        key = f"{self.dataset}[{self.split}] {index}"
        try:
            example = self._data_source[index]
        except Exception as error:  # the parsers of TFDS raise any exception on malformed bytes
            bad = BadRecord(FaultCause.BAD_METADATA, f"{key}: {type(error).__name__}: {error}")
            return Record(key, faults=dict.fromkeys(("image", "captions", "label", "group"), bad))
        faults: dict[str, BadRecord] = {}
        captions: dict[str, tuple[str, ...]] = {}
        try:
            for name, path in (self.captions or {}).items():
                captions[name] = _decode_captions(get_field(example, as_field_path(path)))
        except BadRecord as bad:
            faults["captions"] = bad
        image = get_field(example, as_field_path(self.image))
        record = self._record_fields.build_record(
            key, image=image, metadata=example, faults=faults, captions=captions
        )
        return dataclasses.replace(record, metadata={})  # the features would keep the image alive

    @cached_property
    def _record_fields(self) -> RecordFields:
        label, group = (
            None if path is None else as_field_path(path) for path in (self.label, self.group)
        )
        return RecordFields({}, label=label, group=group)

    @property
    def caption_sets(self) -> tuple[str, ...]:
        """Names of the caption sets that records may have."""
        return tuple(self.captions or ())

    @property
    def has_group(self) -> bool:
        """Whether records have a group."""
        return self.group is not None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels; () unless the label is a ClassLabel."""
        feature = self._builder.info.features
        for key in as_field_path(self.label or ()):
            feature = feature[key]
        return tuple(getattr(feature, "names", None) or ())

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the records, and of the size and modification time of each file."""
        if self.fingerprint_mode == fingerprint_lib.CONTENT:
            return self.listing_fingerprint
        return fingerprint_lib.with_file_stats(self.listing_fingerprint, self._files)

    @cached_property
    def listing_fingerprint(self) -> str:
        """Digest of the name, version, split, number of records and options.

        With the mode "content", of all bytes of each file, too.
        """
        info = self._builder.info
        options = sorted((k, tuple(v)) for k, v in (self.captions or {}).items())
        digest = Fingerprint(info.full_name, self.split, len(self), tuple(self.image), options)
        digest.add(self.label, self.group, info.splits[self.split.partition("[")[0]].num_bytes)
        if self.fingerprint_mode == fingerprint_lib.CONTENT:
            for file in self._files:
                digest.add_content(file)
        return digest.hex()

    @property
    def _files(self) -> Sequence[Path]:
        return sorted(Path(self._builder.data_dir).iterdir())

    @cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets  # here, since importing it takes a second

        try:
            return tensorflow_datasets.builder(self.dataset, data_dir=self.data_dir)
        except tensorflow_datasets.core.DatasetNotFoundError as error:
            raise UserError(
                f"no TFDS data set {self.dataset!r} in data_dir = {self.data_dir!r}: {error}"
            ) from error

    @cached_property
    def _data_source(self) -> Any:
        import tensorflow_datasets

        path = as_field_path(self.image)
        skip: Any = tensorflow_datasets.decode.SkipDecoding()  # since open_image decodes
        for name in reversed(path):
            skip = {name: skip}
        return self._builder.as_data_source(self.split, decoders=skip)


def _decode_captions(value: Any) -> tuple[str, ...]:
    values = value.tolist() if isinstance(value, np.ndarray) else value
    values = values if isinstance(values, list) else [] if values is None else [values]
    return parse_captions(
        [decode_text(v, "caption") if isinstance(v, bytes) else v for v in values]
    )
