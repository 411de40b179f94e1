"""Color transforms, u8[h w 3] -> u8[h w 3]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from imgtune_jax.data.resample import ImageArray, require_rng
from imgtune_jax.errors import UserError


@dataclass(frozen=True)
class ColorJitter:
    """Change brightness, contrast, saturation and hue, with probability `p`, in random order.

    The factor for the brightness is uniform in [max(0, 1 - brightness), 1 + brightness]. Those for
    contrast and saturation are sampled in the same way. The hue is shifted by a fraction of a full
    turn that is uniform in [-hue, hue]. These are the distributions of torchvision's ColorJitter.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.hue <= 0.5:
            raise UserError(f"hue = {self.hue}; expected a fraction of a turn from 0 to 0.5")
        if min(self.brightness, self.contrast, self.saturation) < 0:
            raise UserError(f"{self}; expected brightness, contrast and saturation of at least 0")

    def __call__(self, image: ImageArray, rng: np.random.Generator | None = None) -> ImageArray:
        rng = require_rng(rng, self)
        if rng.random() >= self.p:
            return image
        jittered = Image.fromarray(image)
        for step in rng.permutation(4):
            jittered = self._apply_step(int(step), jittered, rng)
        return np.asarray(jittered)

    def _apply_step(self, step: int, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Change one property: 0 brightness, 1 contrast, 2 saturation, 3 hue."""
        if step == 3:
            return _shift_hue(image, rng.uniform(-self.hue, self.hue)) if self.hue else image
        strength = (self.brightness, self.contrast, self.saturation)[step]
        enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[step]
        if not strength:
            return image
        return enhancer(image).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))


def _shift_hue(image: Image.Image, turns: float) -> Image.Image:
    hsv = np.array(image.convert("HSV"))
    hsv[..., 0] += np.uint8(round(turns * 255) % 256)  # uint8 wraps around, as hue does
    return Image.fromarray(hsv, "HSV").convert("RGB")


@dataclass(frozen=True)
class Grayscale:
    """Replace all three channels with the luminance, with probability `p`."""

    p: float = 0.2

    def __call__(self, image: ImageArray, rng: np.random.Generator | None = None) -> ImageArray:
        if self.p < 1 and require_rng(rng, self).random() >= self.p:
            return image
        return np.asarray(ImageOps.grayscale(Image.fromarray(image)).convert("RGB"))
