"""Images that a caller gives, such as paths, PIL images and arrays, as a source."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image

from imgtune_jax.data.image import decode_image
from imgtune_jax.data.record import BadRecord, Record
from imgtune_jax.errors import MissingFileError, UserError
from imgtune_jax.paths import user_path

log = logging.getLogger("imgtune_jax.data")


@dataclass(frozen=True)
class ImageList:
    """A source of given images. A file is read when its record is used."""

    records: tuple[Record, ...]

    @classmethod
    def from_images(cls, images: Any) -> ImageList:
        """Return a source of one image or of an iterable of images.

        An image is a path, encoded bytes, a PIL image or an array u8[h w], u8[h w 3] or u8[h w 4].
        Raises UserError for any other value, for a path without a file, and for no images.
        """
        records = tuple(_record(i, image) for i, image in enumerate(_as_list(images)))
        if not records:
            raise UserError("no images given; expected one or more paths, PIL images or arrays")
        return cls(records)

    def check_readable(self, valid: Bool[np.ndarray, " n"], *, skip_unreadable: bool) -> None:
        """Raise UserError naming every image that is not `valid`, with the cause.

        With `skip_unreadable`, log a warning instead, unless no image is valid.
        """
        unreadable = [self.records[i] for i in np.flatnonzero(~valid)]
        if not unreadable:
            return
        lines = "\n  ".join(f"{record.key}: {_read_error(record)}" for record in unreadable)
        if not skip_unreadable or not valid.any():
            raise UserError(f"these images cannot be read:\n  {lines}")
        log.warning(
            "skipped %d of %d images, which cannot be read:\n  %s",
            len(unreadable),
            len(self),
            lines,
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    @property
    def fingerprint(self) -> str:
        """Digest of the bytes of all images."""
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(_image_bytes(record.image))
        return digest.hexdigest()


def _as_list(images: Any) -> list[Any]:
    if isinstance(images, str | bytes | os.PathLike | Image.Image):
        return [images]
    if hasattr(images, "__array__"):
        images = np.asarray(images)
        is_image = images.ndim in (2, 3) and images.dtype.kind not in "OSU"
        return [images] if is_image else list(images)
    return list(images) if isinstance(images, Iterable) else [images]


def _record(index: int, image: Any) -> Record:
    if isinstance(image, str | os.PathLike):
        path = user_path(image)
        if not os.path.isfile(path):
            kind = "a folder" if os.path.isdir(path) else "no file"
            raise MissingFileError(f"no image at {path}: {kind}; expected the path of an image")
        return Record(key=str(path), image=path)
    if hasattr(image, "__array__") and not isinstance(image, Image.Image):
        image = np.asarray(image)
    if not isinstance(image, bytes | np.ndarray | Image.Image):
        raise UserError(
            f"image {index} is a {type(image).__name__}; expected a path, a PIL image or an array"
        )
    return Record(key=f"image {index}", image=image)


def _read_error(record: Record) -> str:
    try:
        decode_image(record.image)
    except BadRecord as error:
        return str(error)
    return "the image can be decoded, but not preprocessed"


def _image_bytes(image: Any) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, os.PathLike):
        with open(image, "rb") as file:
            return file.read()
    array = np.asarray(image)
    return f"{array.shape}{array.dtype}".encode() + array.tobytes()
