"""Resizing, antialiased: Pillow's, and the same filters in SIMD for a window of a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
from cykooz_resizer import (
    CropBox,
    FilterType,
    ImageData,
    PixelType,
    ResizeAlg,
    ResizeOptions,
    Resizer,
)
from jaxtyping import UInt8
from PIL import Image

ImageArray = UInt8[np.ndarray, "h w 3"]
Box = tuple[float, float, float, float]  # top, left, height, width, in pixels
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_SIMD = {
    "nearest": ResizeAlg.nearest(),
    "bilinear": ResizeAlg.convolution(FilterType.bilinear),
    "bicubic": ResizeAlg.convolution(FilterType.catmull_rom),  # a = -0.5, as Pillow's
    "lanczos": ResizeAlg.convolution(FilterType.lanczos3),
}
Color = tuple[int, int, int]
WHITE: Color = (255, 255, 255)


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError unless `value` is known."""
    if value not in known:
        raise ValueError(f"{name} = {value!r}; known: {', '.join(known)}")


def as_height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size in pixels. Raises ValueError unless both are positive."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size = {size}; wanted a positive number of pixels, or (height, width)")
    return height, width


def require_rng(rng: np.random.Generator | None, what: object) -> np.random.Generator:
    """The generator. Raises ValueError if there is none."""
    if rng is None:
        raise ValueError(f"{type(what).__name__} is random: call it with rng, or leave it out")
    return rng


def resize(image: ImageArray, height: int, width: int, interpolation: str) -> ImageArray:
    """To height x width by Pillow: what peers' preprocessing computes, to the bit."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), INTERPOLATIONS[interpolation]))


def crop_and_resize(
    image: ImageArray, box: Box, height: int, width: int, interpolation: str
) -> ImageArray:
    """The window `box` to height x width, in one go: Pillow's filters to a rounding, in SIMD.

    Always a new array. Pixels outside the window count only where its edge cuts them.
    """
    top, left, h, w = box
    y, x = int(top), int(left)
    part = image[y : math.ceil(top + h), x : math.ceil(left + w)]
    if part.shape[:2] == (height, width) == (h, w):
        return part.copy()
    options = ResizeOptions(
        resize_alg=_SIMD[interpolation], crop_box=CropBox(left - x, top - y, w, h)
    )
    source = ImageData(part.shape[1], part.shape[0], PixelType.U8x3, part.tobytes())
    out = ImageData(width, height, PixelType.U8x3)
    Resizer().resize(source, out, options)  # its own: one must not be shared between threads
    return np.frombuffer(out.get_buffer(), np.uint8).reshape(height, width, 3)


def pad_to(image: ImageArray, height: int, width: int, fill: Color) -> ImageArray:
    """Grow to at least height x width, the picture in the middle (torchvision's rounding)."""
    h, w = image.shape[:2]
    if h >= height and w >= width:
        return image
    out = np.empty((max(h, height), max(w, width), 3), np.uint8)
    out[:] = fill
    top, left = max(0, (height - h) // 2), max(0, (width - w) // 2)
    out[top : top + h, left : left + w] = image
    return out
