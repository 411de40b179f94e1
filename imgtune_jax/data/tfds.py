"""TensorFlow Datasets (TFDS) in the ArrayRecord format, read without TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from imgtune_jax.data.record import BadRecord, Record
from imgtune_jax.data.record_fields import (
    Fingerprint,
    as_field_path,
    decode_utf8,
    get_field,
    parse_captions,
    parse_group,
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
    """

    dataset: str
    split: str = "train"
    data_dir: str | None = None
    image: Sequence[str] = ("image",)
    captions: Mapping[str, Sequence[str]] | None = None
    label: Sequence[str] | None = None
    group: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not len(self):
            raise UserError(f"{self.dataset}, split {self.split!r}, has no records")
        self._check_features()
        self._check_shards()

    def __len__(self) -> int:
        return len(self._data_source)

    def __getitem__(self, index: int) -> Record:
        example = self._data_source[index]
        faults: dict[str, BadRecord] = {}
        captions: dict[str, tuple[str, ...]] = {}
        try:
            for name, path in (self.captions or {}).items():
                captions[name] = _decode_captions(get_field(example, as_field_path(path)))
        except BadRecord as bad:
            faults["captions"] = bad
        label, group = (
            None if path is None else get_field(example, as_field_path(path))
            for path in (self.label, self.group)
        )
        return Record(
            key=f"{self.dataset}[{self.split}] {index}",
            image=get_field(example, as_field_path(self.image)),
            captions=captions,
            label=None if label is None else int(label),
            group=None if group is None else parse_group(_as_python_scalar(group)),
            faults=faults,
        )

    @property
    def caption_sets(self) -> tuple[str, ...]:
        """Names of the caption sets that records may have."""
        return tuple(self.captions or ())

    @property
    def has_group(self) -> bool:
        """Whether records have a group."""
        return self.group is not None

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the name, version, split, number of records and options."""
        info = self._builder.info
        options = sorted((k, tuple(v)) for k, v in (self.captions or {}).items())
        digest = Fingerprint(info.full_name, self.split, len(self), tuple(self.image), options)
        digest.add(self.label, self.group, info.splits[self.split.partition("[")[0]].num_bytes)
        return digest.hex()

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
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _as_python_scalar(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _decode_captions(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, bytes | str) else list(value if value is not None else ())
    texts = [decode_utf8(v, "caption") if isinstance(v, bytes) else v for v in values]
    return parse_captions(texts)
