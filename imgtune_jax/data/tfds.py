"""TensorFlow Datasets (TFDS) in the ArrayRecord format, read without TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from imgtune_jax.data.record import BadRecord, Record
from imgtune_jax.data.record_fields import (
    FieldPath,
    Fingerprint,
    RecordFields,
    as_field_path,
    decode_utf8,
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
    """

    dataset: str
    split: str = "train"
    data_dir: str | None = None
    image: Sequence[str] = ("image",)
    captions: Mapping[str, Sequence[str]] | None = None
    label: Sequence[str] | None = None
    group: Sequence[str] | None = None

    def __post_init__(self) -> None:
        paths = {"image": self.image, "label": self.label, "group": self.group}
        paths |= {f"captions.{name}": path for name, path in (self.captions or {}).items()}
        for field, path in paths.items():
            if path is not None:
                _check_feature_path(field, as_field_path(path), self._builder.info.features)
        if not len(self):
            raise UserError(f"{self.dataset}, split {self.split!r}, has no records")

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
        paths = {"label": self.label, "group": self.group}
        metadata = {
            name: _as_python_scalar(get_field(example, as_field_path(path)))
            for name, path in paths.items()
            if path is not None
        }
        fields = RecordFields(
            captions={},
            label=None if self.label is None else ("label",),
            group=None if self.group is None else ("group",),
        )
        key = f"{self.dataset}[{self.split}] {index}"
        image = get_field(example, as_field_path(self.image))
        return fields.build_record(
            key, image=image, metadata=metadata, faults=faults, captions=captions
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


def _check_feature_path(field: str, path: FieldPath, features: Any) -> None:
    """Raise UserError, which lists the features, if a path leads to none or to a group of them."""
    for name in (*path, None):
        features = getattr(features, "feature", features)  # that of each item of a sequence
        names = list(features) if hasattr(features, "keys") else []
        if name is None and not names:
            return
        if name not in names:
            problem = f"has no {name!r}" if name is not None else "ends in a group of features"
            raise UserError(
                f"{field} = {path} {problem}; expected a path to one of the features "
                f"{', '.join(names) or 'of the data set'}"
            )
        features = features[name]


def _as_python_scalar(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _decode_captions(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, bytes | str) else list(value if value is not None else ())
    texts = [decode_utf8(v, "caption") if isinstance(v, bytes) else v for v in values]
    return parse_captions(texts)
