"""Crops and padding, u8[h w 3] -> u8[h w 3]."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from imgtune_jax.data.image import WHITE, Color, LazyJpeg
from imgtune_jax.data.resample import (
    INTERPOLATIONS,
    ImageArray,
    Interpolation,
    as_height_width,
    check_choice,
    crop_and_resize,
    pad_to,
    require_rng,
)
from imgtune_jax.errors import UserError


@dataclass(frozen=True)
class CenterCrop:
    """Pad a smaller image with `fill` (black, as in torchvision), then crop the central `size`."""

    size: int | tuple[int, int]
    fill: Color = (0, 0, 0)

    def __post_init__(self) -> None:
        as_height_width(self.size)

    def __call__(self, image: ImageArray, rng: np.random.Generator | None = None) -> ImageArray:
        height, width = as_height_width(self.size)
        image = pad_to(image, height, width, self.fill)
        top = round((image.shape[0] - height) / 2.0)
        left = round((image.shape[1] - width) / 2.0)
        return image[top : top + height, left : left + width]


@dataclass(frozen=True)
class Pad:
    """Add `padding` pixels of `fill` on each side."""

    padding: int
    fill: Color = WHITE

    def __call__(self, image: ImageArray, rng: np.random.Generator | None = None) -> ImageArray:
        h, w = image.shape[:2]
        return pad_to(image, h + 2 * self.padding, w + 2 * self.padding, self.fill)


@dataclass(frozen=True)
class RandomCrop:
    """Pad each side by `padding` pixels, then crop a uniformly sampled window of `size` pixels."""

    size: int | tuple[int, int]
    padding: int = 0
    fill: Color = WHITE

    def __post_init__(self) -> None:
        as_height_width(self.size)

    def __call__(self, image: ImageArray, rng: np.random.Generator | None = None) -> ImageArray:
        rng = require_rng(rng, self)
        height, width = as_height_width(self.size)
        image = Pad(self.padding, fill=self.fill)(image)
        image = pad_to(image, height, width, self.fill)
        top = int(rng.integers(image.shape[0] - height + 1))
        left = int(rng.integers(image.shape[1] - width + 1))
        return image[top : top + height, left : left + width]


@dataclass(frozen=True)
class RandomResizedCrop:
    """Crop a window of random area and aspect ratio, and resize it to `size`.

    `scale` is the range of the window's area, as a fraction of the area of the image. `ratio` is
    the range of the window's width / height. This is Inception's crop, as in torchvision: windows
    are sampled until one fits into the image; after ten failures, the window is the largest central
    one with an allowed aspect ratio. The resize is antialiased. It is a SIMD implementation of
    Pillow's `interpolation` filter, and equals Pillow's up to rounding.

    With `scaled_decode`, a JPEG whose window is at least 4, 8 or 16 times `size` is decoded at 1/2,
    1/4 or 1/8 of its size. The decoded window still has at least twice `size`. This changes pixels
    less than another `interpolation` does, and decodes photographs several times faster.
    """

    size: int | tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"
    scaled_decode: bool = True

    def __post_init__(self) -> None:
        as_height_width(self.size)
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"scale = {self.scale}; expected fractions (low, high) in (0, 1]")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"ratio = {self.ratio}; expected aspect ratios (low, high) above 0")

    def __call__(
        self, image: ImageArray | LazyJpeg, rng: np.random.Generator | None = None
    ) -> ImageArray:
        height, width = image.shape[:2]
        top, left, h, w = self._sample_window(height, width, require_rng(rng, self))
        if isinstance(image, LazyJpeg):
            image = image.decode(self.reduction(h, w), scratch=True)  # its pixels are copied below
        y_scale, x_scale = image.shape[0] / height, image.shape[1] / width  # below 1 when reduced
        box = top * y_scale, left * x_scale, h * y_scale, w * x_scale
        return crop_and_resize(image, box, *as_height_width(self.size), self.interpolation)

    def reduction(self, h: int, w: int) -> int:
        """Return the factor (1, 2, 4 or 8) by which to reduce a JPEG, for a window of h x w."""
        height, width = as_height_width(self.size)
        downscaling = min(h / height, w / width)
        allowed = [factor for factor in (8, 4, 2) if downscaling >= 2 * factor]
        return allowed[0] if allowed and self.scaled_decode else 1

    def _sample_window(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Return (top, left, height, width) of a random window, in pixels."""
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return (
                    int(rng.integers(height - h + 1)),
                    int(rng.integers(width - w + 1)),
                    h,
                    w,
                )
        # No sampled window fits: take the largest central one.
        w = max(1, min(width, round(height * self.ratio[1])))
        h = max(1, min(height, round(width / self.ratio[0])))
        return (height - h) // 2, (width - w) // 2, h, w
