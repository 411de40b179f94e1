"""Antialiased resizing with Pillow, and a SIMD crop-and-resize with the same filters."""

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

from imgtune_jax.data.image import Color
from imgtune_jax.errors import UserError

ImageArray = UInt8[np.ndarray, "h w 3"]
Box = tuple[float, float, float, float]  # top, left, height, width, in pixels
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_SIMD_FILTERS = {
    "nearest": ResizeAlg.nearest(),
    "bilinear": ResizeAlg.convolution(FilterType.bilinear),
    "bicubic": ResizeAlg.convolution(FilterType.catmull_rom),  # cubic with a = -0.5, like Pillow's
    "lanczos": ResizeAlg.convolution(FilterType.lanczos3),
}


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise UserError unless `value` is one of `known`."""
    if value not in known:
        raise UserError(f"{name} = {value!r}; known: {', '.join(known)}")


def as_height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a size in pixels. Raises UserError unless both are positive."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise UserError(f"size = {size}; expected pixels above 0, as n or (height, width)")
    return height, width


def require_rng(rng: np.random.Generator | None, transform: object) -> np.random.Generator:
    """Return the random generator. Raises UserError if it is None."""
    if rng is None:
        name = type(transform).__name__
        raise UserError(f"{name} is random: call it with rng, or remove it from the transforms")
    return rng


def resize(image: ImageArray, height: int, width: int, interpolation: str) -> ImageArray:
    """Resize to height x width with Pillow; bit-identical to torchvision's resize of PIL images."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), INTERPOLATIONS[interpolation]))


def crop_and_resize(
    image: ImageArray, box: Box, height: int, width: int, interpolation: str
) -> ImageArray:
    """Resize the window `box` to height x width in one step.

    The filters are Pillow's, implemented with SIMD instructions. The values equal Pillow's up to
    rounding. The result is always a new array. The window may end inside a pixel, which then
    contributes in part. Pixels outside the window do not contribute.
    """
    top, left, h, w = box
    first_row, first_column = int(top), int(left)
    window = image[first_row : math.ceil(top + h), first_column : math.ceil(left + w)]
    if window.shape[:2] == (height, width) == (h, w):
        return window.copy()
    options = ResizeOptions(
        resize_alg=_SIMD_FILTERS[interpolation],
        crop_box=CropBox(left - first_column, top - first_row, w, h),
    )
    source = ImageData(window.shape[1], window.shape[0], PixelType.U8x3, window.tobytes())
    out = ImageData(width, height, PixelType.U8x3)
    Resizer().resize(source, out, options)  # a new Resizer, since threads must not share one
    return np.frombuffer(out.get_buffer(), np.uint8).reshape(height, width, 3)


def pad_to(image: ImageArray, height: int, width: int, fill: Color) -> ImageArray:
    """Pad to at least height x width. The image is centered, and rounded as in torchvision."""
    h, w = image.shape[:2]
    if h >= height and w >= width:
        return image
    out = np.empty((max(h, height), max(w, width), 3), np.uint8)
    out[:] = fill
    top, left = max(0, (height - h) // 2), max(0, (width - w) // 2)
    out[top : top + h, left : left + w] = image
    return out
