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
from imgtune_jax.paths import user_path


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
        self._check_features()
        self._check_shards()

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

        if self.dataset and user_path(self.dataset).is_dir():
            raise UserError(
                f"dataset = {self.dataset!r} is a folder; expected the name of a data set, such as "
                "'coco_captions/2014', and data_dir = the folder that contains its folder"
            )
        try:
            builder = tensorflow_datasets.builder(self.dataset, data_dir=self.data_dir)
        except Exception as error:  # the library raises many classes
            raise UserError(
                f"no TFDS data set {self.dataset!r} in data_dir = {self.data_dir!r}; expected the "
                f"name and folder of a prepared data set\n{_first_line(error)}"
            ) from error
        if not builder.data_path.is_dir():
            raise UserError(
                f"{self.dataset!r} is not prepared: no folder {builder.data_path}; set data_dir or "
                f"prepare it with\ntfds build {builder.name} --file_format=array_record"
            )
        return builder

    @cached_property
    def _data_source(self) -> Any:
        import tensorflow_datasets

        path = as_field_path(self.image)
        skip: Any = tensorflow_datasets.decode.SkipDecoding()  # since open_image decodes
        for name in reversed(path):
            skip = {name: skip}
        builder = self._builder
        try:
            return builder.as_data_source(self.split, decoders=skip)
        except NotImplementedError as error:
            formats = ", ".join(sorted(f.value for f in builder.info.available_file_formats()))
            raise UserError(
                f"{self.dataset} in {builder.data_dir} has the format {formats or None}; expected "
                "array_record, which has random access: prepare it with\n"
                f"tfds build {builder.name} --file_format=array_record"
            ) from error
        except (AssertionError, ValueError, OSError) as error:
            raise UserError(
                f"{self.dataset}, split {self.split!r}, cannot be read from {builder.data_dir}; "
                f"expected a prepared split\n{_first_line(error)}"
            ) from error

    def _check_features(self) -> None:
        """Raise UserError if a path is not that of a feature, or is that of a group of features."""
        paths = {f"captions[{name!r}]": path for name, path in (self.captions or {}).items()}
        paths |= {"image": self.image, "label": self.label, "group": self.group}
        for option, path in paths.items():
            features: Any = self._builder.info.features
            for name in () if path is None else as_field_path(path):
                known = _feature_names(features)
                if name not in known:
                    raise UserError(
                        f"{self.dataset}: {option} = {path}, but there is no feature {name!r}; "
                        f"expected one of {known} in its place"
                    )
                features = features[name]
            if path is not None and (known := _feature_names(features)):
                raise UserError(
                    f"{self.dataset}: {option} = {path} is a group of features; append one of "
                    f"{known} to the path"
                )

    def _check_shards(self) -> None:
        """Raise UserError for a shard that is missing, damaged or cut short."""
        from array_record.python.array_record_module import ArrayRecordReader

        info = self._builder.info
        if info.file_format.value != "array_record":
            return
        for file in info.splits[self.split].file_instructions:
            try:
                reader = ArrayRecordReader(file.filename)
                found = reader.num_records()
                reader.close()
            except Exception as error:  # the reader raises several classes for damaged bytes
                raise _shard_error(file.filename, _first_line(error)) from error
            if found != file.examples_in_shard:
                detail = f"it has {found} records; expected {file.examples_in_shard}"
                raise _shard_error(file.filename, detail)


def _feature_names(features: Any) -> list[str]:
    """Return the names in a group of features; a sequence of groups has the names of its groups."""
    return list(features.keys()) if hasattr(features, "keys") else []


def _shard_error(path: str, detail: str) -> UserError:
    size = Path(path).stat().st_size if Path(path).is_file() else 0
    return UserError(
        f"the shard {path} ({size} bytes) cannot be read; copy it or prepare the data set again\n"
        f"{detail}"
    )


def _first_line(error: Exception) -> str:
    """Return the first line of an error, cut to 200 characters; some have hundreds of lines."""
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]


def _decode_captions(value: Any) -> tuple[str, ...]:
    values = value.tolist() if isinstance(value, np.ndarray) else value
    values = values if isinstance(values, list) else [] if values is None else [values]
    return parse_captions(
        [decode_text(v, "caption") if isinstance(v, bytes) else v for v in values]
    )
