"""Image transforms, u8[h w 3] -> u8[h w 3], and their table.

No transform normalizes pixels: the model does, on the device. `resize` is Pillow's antialiased
resize, so `resize` (shortest, bicubic) followed by `center_crop` returns the pixels of CLIP's
preprocessing bit for bit, for RGB images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, cast

import numpy as np
from PIL import Image

from imgtune_jax.data.color import ColorJitter, Grayscale
from imgtune_jax.data.crops import CenterCrop, Pad, RandomCrop, RandomResizedCrop
from imgtune_jax.data.image import WHITE, Color, LazyJpeg
from imgtune_jax.data.resample import (
    INTERPOLATIONS,
    ImageArray,
    Interpolation,
    as_height_width,
    check_choice,
    pad_to,
    require_rng,
    resize,
)
from imgtune_jax.errors import UserError

# Part of the feature cache's key. Increment it if a code change alters the pixels for some config.
TRANSFORMS_VERSION = 2


class Transform(Protocol):
    """A pure function of an image and a random generator."""

    def __call__(self, image: ImageArray, rng: np.random.Generator | None = None) -> ImageArray: ...


@dataclass(frozen=True)
class Resize:
    """Resize to `size` pixels, antialiased.

    Modes: "squash" resizes to (size, size) and ignores the aspect ratio. "shortest" resizes the
    shorter side to `size` and preserves the aspect ratio, as torchvision's Resize(int). "longest"
    resizes the longer side to `size`, preserves the aspect ratio, and pads with `fill` to a square.
    """

    size: int | tuple[int, int]
    mode: Literal["squash", "shortest", "longest"] = "squash"
    interpolation: Interpolation = "bicubic"
    fill: Color = WHITE

    def __post_init__(self) -> None:
        check_choice("resize mode", self.mode, ("squash", "shortest", "longest"))
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        as_height_width(self.size)
        if self.mode != "squash" and not isinstance(self.size, int):
            raise UserError(f"size = {self.size} with mode {self.mode!r}; expected one integer")

    def __call__(self, image: ImageArray, rng: np.random.Generator | None = None) -> ImageArray:
        height, width = as_height_width(self.size)
        h, w = image.shape[:2]
        if self.mode == "shortest":  # int() truncates, as torchvision does
            height = height if h <= w else int(height * h / w)
            width = width if w <= h else int(width * w / h)
        elif self.mode == "longest":
            scale = height / max(h, w)
            small = resize(
                image, max(1, round(h * scale)), max(1, round(w * scale)), self.interpolation
            )
            return pad_to(small, height, width, self.fill)
        return resize(image, height, width, self.interpolation)


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirror the image left to right, with probability `p`."""

    p: float = 0.5

    def __call__(self, image: ImageArray, rng: np.random.Generator | None = None) -> ImageArray:
        if require_rng(rng, self).random() >= self.p:
            return image
        flipped = np.empty_like(image)
        for channel in range(3):  # five times faster than all channels at once
            flipped[..., channel] = image[:, ::-1, channel]
        return flipped


@dataclass(frozen=True)
class Rotate:
    """Rotate by a uniform angle in [-degrees, degrees], and fill the corners with `fill`."""

    degrees: float
    fill: Color = WHITE

    def __call__(self, image: ImageArray, rng: np.random.Generator | None = None) -> ImageArray:
        angle = require_rng(rng, self).uniform(-self.degrees, self.degrees)
        rotated = Image.fromarray(image).rotate(
            angle, Image.Resampling.BILINEAR, fillcolor=tuple(self.fill)
        )
        return np.asarray(rotated)


@dataclass(frozen=True)
class Compose:
    """Apply transforms in order, with one random generator.

    The input may be a LazyJpeg: if the first transform is a RandomResizedCrop, it decodes the JPEG
    at a reduced size where that suffices.
    """

    transforms: tuple[Transform, ...]

    def __call__(
        self, image: ImageArray | LazyJpeg, rng: np.random.Generator | None = None
    ) -> ImageArray:
        remaining = self.transforms
        if isinstance(image, LazyJpeg):
            first = remaining[0] if remaining else None
            if isinstance(first, RandomResizedCrop):
                image, remaining = first(image, rng), remaining[1:]
            else:
                image = image.decode()
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"image is {image.dtype}{list(image.shape)}; expected uint8 [h w 3]")
        for transform in remaining:
            image = transform(image, rng)
        return image


@dataclass(frozen=True)
class RandomApply:
    """Apply all of `transforms` (objects or configs) with probability `p`, else none."""

    transforms: tuple[Transform | Mapping[str, Any], ...]
    p: float = 0.5

    def __post_init__(self) -> None:
        built = (_build_one_transform(t) if isinstance(t, Mapping) else t for t in self.transforms)
        object.__setattr__(self, "transforms", tuple(built))

    def __call__(self, image: ImageArray, rng: np.random.Generator | None = None) -> ImageArray:
        if require_rng(rng, self).random() >= self.p:
            return image
        return Compose(cast(tuple[Transform, ...], self.transforms))(image, rng)


TRANSFORMS: dict[str, type] = {
    "resize": Resize,
    "center_crop": CenterCrop,
    "random_crop": RandomCrop,
    "random_resized_crop": RandomResizedCrop,
    "horizontal_flip": HorizontalFlip,
    "color_jitter": ColorJitter,
    "grayscale": Grayscale,
    "rotate": Rotate,
    "pad": Pad,
    "random_apply": RandomApply,
}


def build_transform(configs: Iterable[Mapping[str, Any]]) -> Compose:
    """Build transforms from `[{"name": "resize", "size": 224}, …]`, in order.

    Raises UserError for an unknown name or field, and for an invalid value.
    """
    return Compose(tuple(_build_one_transform(config) for config in configs))


def output_shape(transform: Compose) -> tuple[int, ...]:
    """Return the shape of transformed images, measured on two blank images.

    Raises UserError if the shape depends on the image.
    """
    blanks = np.zeros((48, 64, 3), np.uint8), np.zeros((80, 40, 3), np.uint8)
    first, second = (transform(b, np.random.default_rng(0)).shape for b in blanks)
    if first != second:
        raise UserError(
            f"the transforms return images of different sizes ({first}, {second}); end them "
            "with a resize (squash or longest) or a crop"
        )
    return first


def _build_one_transform(config: Mapping[str, Any]) -> Transform:
    settings = dict(config)
    name = settings.pop("name", None)
    if name not in TRANSFORMS:
        raise UserError(f"transform {name!r} is unknown; known: {', '.join(TRANSFORMS)}")
    transform_class = TRANSFORMS[name]
    known = [f.name for f in fields(transform_class)]
    if unknown := set(settings) - set(known):
        raise UserError(
            f"transform {name!r} has no fields {sorted(unknown)}; it has {', '.join(known)}"
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    try:
        return transform_class(**values)
    except TypeError as error:
        raise UserError(f"transform {name!r}: {error}") from error
