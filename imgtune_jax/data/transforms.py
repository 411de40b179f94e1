"""Picture -> picture, u8[h w 3] both. Normalisation happens on the device, with the weights.

Resizing is Pillow's, antialiased, so an evaluation pipeline of `resize` (shortest, bicubic) and
`center_crop` gives CLIP's pixels to the bit, for RGB images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, cast

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

Picture = UInt8[np.ndarray, "h w 3"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)


class Transform(Protocol):
    """A pure function of the picture and of a generator that is its own."""

    def __call__(self, image: Picture, rng: np.random.Generator | None = None) -> Picture: ...


def _choose(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} = {value!r}; known: {', '.join(known)}")


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size = {size}; wanted a positive number of pixels, or (height, width)")
    return height, width


def _need(rng: np.random.Generator | None, what: object) -> np.random.Generator:
    if rng is None:
        raise ValueError(f"{type(what).__name__} is random: call it with rng, or leave it out")
    return rng


def _resized(image: Picture, height: int, width: int, interpolation: str) -> Picture:
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), INTERPOLATIONS[interpolation]))


def _padded(image: Picture, height: int, width: int, fill: Colour) -> Picture:
    """Grow to at least height x width, the picture in the middle (torchvision's rounding)."""
    h, w = image.shape[:2]
    if h >= height and w >= width:
        return image
    out = np.empty((max(h, height), max(w, width), 3), np.uint8)
    out[:] = fill
    top, left = max(0, (height - h) // 2), max(0, (width - w) // 2)
    out[top : top + h, left : left + w] = image
    return out


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
    fill: Colour = WHITE

    def __post_init__(self) -> None:
        _choose("resize mode", self.mode, ("squash", "shortest", "longest"))
        _choose("interpolation", self.interpolation, INTERPOLATIONS)
        _pair(self.size)
        if self.mode != "squash" and not isinstance(self.size, int):
            raise ValueError(f"size = {self.size} with mode {self.mode!r}; wanted one integer")

    def __call__(self, image: Picture, rng: np.random.Generator | None = None) -> Picture:
        height, width = _pair(self.size)
        h, w = image.shape[:2]
        if self.mode == "shortest":  # truncation, as torchvision does
            height = height if h <= w else int(height * h / w)
            width = width if w <= h else int(width * w / h)
        elif self.mode == "longest":
            scale = height / max(h, w)
            small = _resized(
                image, max(1, round(h * scale)), max(1, round(w * scale)), self.interpolation
            )
            return _padded(small, height, width, self.fill)
        return _resized(image, height, width, self.interpolation)


@dataclass(frozen=True)
class CenterCrop:
    """The middle `size` pixels; a smaller picture is padded with `fill` (torchvision's: black)."""

    size: int | tuple[int, int]
    fill: Colour = (0, 0, 0)

    def __post_init__(self) -> None:
        _pair(self.size)

    def __call__(self, image: Picture, rng: np.random.Generator | None = None) -> Picture:
        height, width = _pair(self.size)
        image = _padded(image, height, width, self.fill)
        top = round((image.shape[0] - height) / 2.0)
        left = round((image.shape[1] - width) / 2.0)
        return image[top : top + height, left : left + width]


@dataclass(frozen=True)
class RandomCrop:
    """A uniformly drawn window of `size` pixels, after `padding` pixels of `fill` on each side."""

    size: int | tuple[int, int]
    padding: int = 0
    fill: Colour = WHITE

    def __post_init__(self) -> None:
        _pair(self.size)

    def __call__(self, image: Picture, rng: np.random.Generator | None = None) -> Picture:
        rng = _need(rng, self)
        height, width = _pair(self.size)
        image = Pad(self.padding, fill=self.fill)(image)
        image = _padded(image, height, width, self.fill)
        top = int(rng.integers(image.shape[0] - height + 1))
        left = int(rng.integers(image.shape[1] - width + 1))
        return image[top : top + height, left : left + width]


@dataclass(frozen=True)
class RandomResizedCrop:
    """A window of a drawn area (`scale`, a share) and aspect (`ratio`, w/h), resized to `size`.

    Inception's crop: ten tries, then the largest middle window whose aspect is allowed.
    """

    size: int | tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        _pair(self.size)
        _choose("interpolation", self.interpolation, INTERPOLATIONS)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale = {self.scale}; wanted shares (low, high) in (0, 1]")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio = {self.ratio}; wanted aspects (low, high) above 0")

    def __call__(self, image: Picture, rng: np.random.Generator | None = None) -> Picture:
        top, left, h, w = self._window(image.shape[0], image.shape[1], _need(rng, self))
        return _resized(
            image[top : top + h, left : left + w], *_pair(self.size), self.interpolation
        )

    def _window(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
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
        w = max(1, min(width, round(height * self.ratio[1])))
        h = max(1, min(height, round(width / self.ratio[0])))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirror left and right with probability `p`."""

    p: float = 0.5

    def __call__(self, image: Picture, rng: np.random.Generator | None = None) -> Picture:
        return image[:, ::-1] if _need(rng, self).random() < self.p else image


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

    def __call__(self, image: Picture, rng: np.random.Generator | None = None) -> Picture:
        rng = _need(rng, self)
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

    def __call__(self, image: Picture, rng: np.random.Generator | None = None) -> Picture:
        if self.p < 1 and _need(rng, self).random() >= self.p:
            return image
        return np.asarray(ImageOps.grayscale(Image.fromarray(image)).convert("RGB"))


@dataclass(frozen=True)
class Rotate:
    """Turn by an angle drawn from ± `degrees`; corners are filled with `fill`."""

    degrees: float
    fill: Colour = WHITE

    def __call__(self, image: Picture, rng: np.random.Generator | None = None) -> Picture:
        angle = _need(rng, self).uniform(-self.degrees, self.degrees)
        turned = Image.fromarray(image).rotate(
            angle, Image.Resampling.BILINEAR, fillcolor=tuple(self.fill)
        )
        return np.asarray(turned)


@dataclass(frozen=True)
class Pad:
    """`padding` pixels of `fill` on each side."""

    padding: int
    fill: Colour = WHITE

    def __call__(self, image: Picture, rng: np.random.Generator | None = None) -> Picture:
        h, w = image.shape[:2]
        return _padded(image, h + 2 * self.padding, w + 2 * self.padding, self.fill)


@dataclass(frozen=True)
class Compose:
    """One transform after the other, all drawing from one generator."""

    transforms: tuple[Transform, ...]

    def __call__(self, image: Picture, rng: np.random.Generator | None = None) -> Picture:
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"got {image.dtype}{list(image.shape)}; wanted uint8 [h w 3]")
        for transform in self.transforms:
            image = transform(image, rng)
        return np.ascontiguousarray(image)


@dataclass(frozen=True)
class RandomApply:
    """With probability `p`, all of `transforms` (components or their mappings); else none."""

    transforms: tuple[Transform | Mapping[str, Any], ...]
    p: float = 0.5

    def __post_init__(self) -> None:
        built = (_build(dict(t)) if isinstance(t, Mapping) else t for t in self.transforms)
        object.__setattr__(self, "transforms", tuple(built))

    def __call__(self, image: Picture, rng: np.random.Generator | None = None) -> Picture:
        if _need(rng, self).random() >= self.p:
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
