"""Picture -> picture, u8[h w 3] both. Normalisation happens on the device, with the weights.

Resizing is Pillow's, antialiased, so an evaluation pipeline of `resize` (shortest, bicubic) and
`center_crop` gives CLIP's pixels to the bit, for RGB images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, cast

import numpy as np
from PIL import Image

from imgtune_jax.data.color import ColorJitter, Grayscale
from imgtune_jax.data.crops import CenterCrop, Pad, RandomCrop, RandomResizedCrop
from imgtune_jax.data.image import LazyJpeg
from imgtune_jax.data.resample import (
    INTERPOLATIONS,
    WHITE,
    Color,
    ImageArray,
    Interpolation,
    as_height_width,
    check_choice,
    pad_to,
    require_rng,
    resize,
)

TRANSFORMS_VERSION = (
    2  # raise it when equal settings give other pixels: what was cached of them is then stale
)


class Transform(Protocol):
    """A pure function of the picture and of a generator that is its own."""

    def __call__(self, image: ImageArray, rng: np.random.Generator | None = None) -> ImageArray: ...


@dataclass(frozen=True)
class Resize:
    """Resize to `size` pixels, antialiased.

    mode "squash": to (size, size), whatever the aspect; "shortest": the shorter side to size,
    aspect kept (torchvision's Resize(int)); "longest": the longer side to size, aspect kept, then
    padded with `fill` to a square.
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
            raise ValueError(f"size = {self.size} with mode {self.mode!r}; wanted one integer")

    def __call__(self, image: ImageArray, rng: np.random.Generator | None = None) -> ImageArray:
        height, width = as_height_width(self.size)
        h, w = image.shape[:2]
        if self.mode == "shortest":  # truncation, as torchvision does
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
    """Mirror left and right with probability `p`."""

    p: float = 0.5

    def __call__(self, image: ImageArray, rng: np.random.Generator | None = None) -> ImageArray:
        if require_rng(rng, self).random() >= self.p:
            return image
        flipped = np.empty_like(image)
        for channel in range(3):  # NumPy mirrors planes five times faster than pixels of three
            flipped[..., channel] = image[:, ::-1, channel]
        return flipped


@dataclass(frozen=True)
class Rotate:
    """Turn by an angle drawn from ± `degrees`; corners are filled with `fill`."""

    degrees: float
    fill: Color = WHITE

    def __call__(self, image: ImageArray, rng: np.random.Generator | None = None) -> ImageArray:
        angle = require_rng(rng, self).uniform(-self.degrees, self.degrees)
        turned = Image.fromarray(image).rotate(
            angle, Image.Resampling.BILINEAR, fillcolor=tuple(self.fill)
        )
        return np.asarray(turned)


@dataclass(frozen=True)
class Compose:
    """One transform after the other, all drawing from one generator.

    A JPEG may come undecoded: a crop that is first decodes no more of it than it needs.
    """

    transforms: tuple[Transform, ...]

    def __call__(
        self, image: ImageArray | LazyJpeg, rng: np.random.Generator | None = None
    ) -> ImageArray:
        rest = self.transforms
        if isinstance(image, LazyJpeg):
            first = rest[0] if rest else None
            if isinstance(first, RandomResizedCrop):
                image, rest = first(image, rng), rest[1:]
            else:
                image = image.decode()
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"got {image.dtype}{list(image.shape)}; wanted uint8 [h w 3]")
        for transform in rest:
            image = transform(image, rng)
        return image


@dataclass(frozen=True)
class RandomApply:
    """With probability `p`, all of `transforms` (components or their mappings); else none."""

    transforms: tuple[Transform | Mapping[str, Any], ...]
    p: float = 0.5

    def __post_init__(self) -> None:
        built = (_build(dict(t)) if isinstance(t, Mapping) else t for t in self.transforms)
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
    """From `[{"name": "resize", "size": 224}, …]`, in order. Raises ValueError on a wrong one."""
    return Compose(tuple(_build(dict(config)) for config in configs))


def _build(config: dict[str, Any]) -> Transform:
    name = config.pop("name", None)
    if name not in TRANSFORMS:
        raise ValueError(f"transform {name!r} is unknown; known: {', '.join(TRANSFORMS)}")
    kind = TRANSFORMS[name]
    known = [f.name for f in fields(kind)]
    if wrong := set(config) - set(known):
        raise ValueError(f"transform {name!r} has no {sorted(wrong)}; it has {', '.join(known)}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"transform {name!r}: {error}") from error
