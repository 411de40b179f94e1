"""Whatever holds a picture -> u8[h w 3]. Hostile bytes end in a BadRecord, never in a crash."""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from imgtune_jax.data.record import BadRecord, FaultCause

MAX_PIXELS = 89_478_485  # Pillow's own warning threshold
WHITE = (255, 255, 255)
BUFFER_BYTES = 1 << 24  # a larger picture's pages are little beside its decoding
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright


@dataclass(frozen=True, eq=False)
class LazyJpeg:
    """An upright JPEG in colour or gray that waits to be decoded, whole or smaller."""

    data: bytes
    opened: Image.Image  # Pillow has read its header

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the whole picture: height, width, 3."""
        return self.opened.height, self.opened.width, 3

    def decode(self, reduction: int = 1, *, scratch: bool = False) -> UInt8[np.ndarray, "h w 3"]:
        """RGB by libjpeg-turbo, whole the same to the bit as Pillow's.

        A `reduction` of 2, 4 or 8 divides both sides, rounded up: each pixel comes from the lower
        frequencies of its block. With `scratch`, the thread's next such call overwrites the pixels.
        Raises BadRecord.
        """
        height, width = (-(-side // reduction) for side in self.shape[:2])
        try:
            return simplejpeg.decode_jpeg(
                self.data,
                min_height=height,
                min_width=width,
                min_factor=reduction,
                buffer=_thread_buffer(height * width * 3) if scratch else None,
                strict=True,
            )
        except ValueError:  # Pillow says what is wrong, or forgives it
            return _decode_with_pillow(self.opened, WHITE, self.data)


_THREAD_LOCAL = threading.local()


def _thread_buffer(size: int) -> UInt8[np.ndarray, " n"] | None:
    """Memory of this thread, so that pixels that are let go at once need no fresh pages."""
    if size > BUFFER_BYTES:
        return None
    if not hasattr(_THREAD_LOCAL, "memory"):
        _THREAD_LOCAL.memory = np.empty(BUFFER_BYTES, np.uint8)  # pages come when they are touched
    return _THREAD_LOCAL.memory


def decode_image(
    image: Any,
    *,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = WHITE,
) -> UInt8[np.ndarray, "h w 3"]:
    """RGB of encoded bytes, a path, a PIL image or an array: `peek`, decoded whole."""
    found = open_image(image, max_pixels=max_pixels, background=background)
    return found.decode() if isinstance(found, LazyJpeg) else found


def open_image(
    image: Any,
    *,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = WHITE,
) -> UInt8[np.ndarray, "h w 3"] | LazyJpeg:
    """RGB, or a Jpeg that is not decoded yet, of encoded bytes, a path, a PIL image or an array.

    EXIF rotation is applied, an animation gives its first frame, alpha is composited on
    `background`, 16 bits are scaled to 8 (not clipped). The number of pixels is checked in the
    header, before anything is decoded. Raises BadRecord.
    """
    if image is None:
        raise BadRecord(FaultCause.MISSING_IMAGE, "the record has no image")
    if isinstance(image, np.ndarray):
        return _from_pil(_array_to_pil(image, max_pixels), background)
    if isinstance(image, Image.Image):
        _check_size(image, max_pixels)
        return _decode_with_pillow(image, background)
    if isinstance(image, str | Path):
        try:
            image = Path(image).read_bytes()
        except OSError as error:
            raise BadRecord(FaultCause.MISSING_IMAGE, str(error)) from error
    data = bytes(image)
    try:
        opened = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise BadRecord(FaultCause.TOO_MANY_PIXELS, str(error)) from error
    except Exception as error:  # Pillow's parsers raise anything on hostile bytes
        raise _unreadable(data, error) from error
    _check_size(opened, max_pixels)
    return (
        LazyJpeg(data, opened)
        if _is_plain_jpeg(opened)
        else _decode_with_pillow(opened, background, data)
    )


def _is_plain_jpeg(opened: Image.Image) -> bool:
    """Does libjpeg-turbo alone give what Pillow would? Not for CMYK, several pictures, rotation."""
    if opened.format != "JPEG" or opened.mode not in ("RGB", "L"):
        return False
    try:
        return opened.getexif().get(ORIENTATION, 1) == 1
    except Exception:  # Pillow's parsers raise anything on hostile bytes; `_guarded` says so
        return False


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise BadRecord(
            FaultCause.TOO_MANY_PIXELS,
            f"{width}x{height} has {width * height} pixels; at most {max_pixels} are decoded",
        )


def _decode_with_pillow(
    image: Image.Image, background: tuple[int, int, int], data: bytes = b""
) -> UInt8[np.ndarray, "h w 3"]:
    try:
        image.load()
        return _from_pil(ImageOps.exif_transpose(image), background)
    except (BadRecord, MemoryError):
        raise
    except Exception as error:  # Pillow's parsers raise anything on hostile bytes
        raise _unreadable(data, error) from error


def _unreadable(data: bytes, error: Exception) -> BadRecord:
    """The BadRecord that says why these bytes did not become a picture."""
    text = f"{type(error).__name__}: {error}"
    # A WebP names its size in its header; its decoder does not say that bytes are missing.
    short_webp = data[:4] == b"RIFF" and len(data) < int.from_bytes(data[4:8], "little") + 8
    if short_webp or isinstance(error, EOFError) or "truncated" in text.lower():
        return BadRecord(FaultCause.TRUNCATED_IMAGE, f"{text} ({len(data)} bytes)")
    if isinstance(error, UnidentifiedImageError):
        return BadRecord(
            FaultCause.NOT_AN_IMAGE, f"{len(data)} bytes that begin with {data[:12]!r}"
        )
    return BadRecord(FaultCause.UNDECODABLE_IMAGE, text)


def _from_pil(image: Image.Image, background: tuple[int, int, int]) -> UInt8[np.ndarray, "h w 3"]:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _scale_16_bit(np.asarray(image))
    if image.mode == "F":
        raise BadRecord(FaultCause.UNSUPPORTED_IMAGE, "floating-point pixels; wanted 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(below, image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _scale_16_bit(pixels: Shaped[np.ndarray, "h w"]) -> Image.Image:
    if pixels.min() < 0 or pixels.max() > 65535:
        raise BadRecord(FaultCause.UNSUPPORTED_IMAGE, "pixels of more than 16 bits; wanted 8 or 16")
    return Image.fromarray(((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _array_to_pil(array: np.ndarray, max_pixels: int) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise BadRecord(
            FaultCause.UNSUPPORTED_IMAGE,
            f"array of shape {array.shape}; wanted [h w], [h w 1], [h w 3] or [h w 4]",
        )
    if array.shape[0] * array.shape[1] > max_pixels:
        raise BadRecord(
            FaultCause.TOO_MANY_PIXELS, f"array {array.shape}; at most {max_pixels} pixels"
        )
    if array.dtype == np.uint16:
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8 or array.size == 0:
        raise BadRecord(
            FaultCause.UNSUPPORTED_IMAGE,
            f"array {array.dtype}{list(array.shape)}; wanted uint8 or uint16, not empty",
        )
    return Image.fromarray(np.ascontiguousarray(array))
