"""Changes of colour, u8[h w 3] -> u8[h w 3]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from imgtune_jax.data.resample import ImageArray, require_rng


@dataclass(frozen=True)
class ColorJitter:
    """With probability `p`, in drawn order: factors of brightness, contrast and saturation from
    1 ± the field, and a shift of hue by up to ± `hue` turns (torchvision's ColorJitter)."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue = {self.hue}; wanted turns in 0..0.5")
        if min(self.brightness, self.contrast, self.saturation) < 0:
            raise ValueError(f"{self}: a strength is not negative")

    def __call__(self, image: ImageArray, rng: np.random.Generator | None = None) -> ImageArray:
        rng = require_rng(rng, self)
        if rng.random() >= self.p:
            return image
        picture = Image.fromarray(image)
        for step in rng.permutation(4):
            picture = self._step(int(step), picture, rng)
        return np.asarray(picture)

    def _step(self, step: int, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        if step == 3:
            return _shift_hue(picture, rng.uniform(-self.hue, self.hue)) if self.hue else picture
        strength = (self.brightness, self.contrast, self.saturation)[step]
        enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[step]
        if not strength:
            return picture
        return enhancer(picture).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))


def _shift_hue(picture: Image.Image, turns: float) -> Image.Image:
    hsv = np.array(picture.convert("HSV"))
    hsv[..., 0] += np.uint8(round(turns * 255) % 256)  # wraps around, as hue does
    return Image.fromarray(hsv, "HSV").convert("RGB")


@dataclass(frozen=True)
class Grayscale:
    """With probability `p`, luminance in all three channels."""

    p: float = 0.2

    def __call__(self, image: ImageArray, rng: np.random.Generator | None = None) -> ImageArray:
        if self.p < 1 and require_rng(rng, self).random() >= self.p:
            return image
        return np.asarray(ImageOps.grayscale(Image.fromarray(image)).convert("RGB"))
