"""Encoded bytes, path, PIL image or array -> u8[h w 3].

Malformed bytes raise BadRecord, and no other exception.
"""

from __future__ import annotations

import io
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from imgtune_jax.data.record import BadRecord, FaultCause

Color = tuple[int, int, int]  # RGB
WHITE: Color = (255, 255, 255)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 89_478_485  # Pillow's warning threshold
MAX_ASPECT_RATIO = 200  # resizing the shorter side of a thinner image would allocate gigabytes
MAX_FILE_BYTES = 1 << 30
# Larger images have no buffer: for them, page faults cost little compared with decoding.
BUFFER_BYTES = 1 << 24
ORIENTATION = 0x0112  # EXIF tag; its value 1 means upright


@dataclass(frozen=True, eq=False)
class LazyJpeg:
    """An undecoded, upright RGB or gray JPEG, which can be decoded at full or reduced size."""

    data: bytes
    opened: Image.Image  # only its header has been read

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the image at full size: (height, width, 3)."""
        return self.opened.height, self.opened.width, 3

    def decode(self, reduction: int = 1, *, scratch: bool = False) -> UInt8[np.ndarray, "h w 3"]:
        """Decode to RGB with libjpeg-turbo; full-size pixels equal Pillow's bit for bit.

        A `reduction` of 2, 4 or 8 divides height and width, rounded up. It decodes only the lower
        frequencies of each DCT (discrete cosine transform) block. With `scratch`, the result is in
        a buffer of this thread, which its next call with `scratch` overwrites. Raises BadRecord.
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
        except ValueError:  # Pillow may decode the file anyway; else it reports the cause
            return _decode_with_pillow(self.opened, WHITE, self.data)


_THREAD_LOCAL = threading.local()


def _thread_buffer(size: int) -> UInt8[np.ndarray, " n"] | None:
    """Return this thread's buffer, or None if `size` exceeds its size.

    Reusing one buffer avoids a page fault for each new page of memory.
    """
    if size > BUFFER_BYTES:
        return None
    if not hasattr(_THREAD_LOCAL, "memory"):
        # Small images use few pages: the operating system maps a page on its first use.
        _THREAD_LOCAL.memory = np.empty(BUFFER_BYTES, np.uint8)
    return _THREAD_LOCAL.memory


def decode_image(
    image: Any,
    *,
    max_pixels: int = MAX_PIXELS,
    background: Color = WHITE,
) -> UInt8[np.ndarray, "h w 3"]:
    """Return the RGB pixels of encoded bytes, a path, a PIL image or an array.

    The options and errors are those of `open_image`.
    """
    opened = open_image(image, max_pixels=max_pixels, background=background)
    return opened.decode() if isinstance(opened, LazyJpeg) else opened


def open_image(
    image: Any,
    *,
    max_pixels: int = MAX_PIXELS,
    background: Color = WHITE,
) -> UInt8[np.ndarray, "h w 3"] | LazyJpeg:
    """Return the RGB pixels, or a LazyJpeg, of encoded bytes, a path, a PIL image or an array.

    EXIF rotation is applied, the first frame of an animation is used, alpha is composited on
    `background`, and 16-bit values are scaled (not clipped) to 8 bits. The number of pixels is
    checked in the header, before decoding. Raises BadRecord.
    """
    if image is None:
        raise BadRecord(FaultCause.MISSING_IMAGE, "the record has no image")
    if isinstance(image, np.ndarray):
        return _pil_to_rgb(_array_to_pil(image, max_pixels), background)
    if isinstance(image, Image.Image):
        _check_size(image, max_pixels)
        return _decode_with_pillow(image, background)
    if isinstance(image, str | Path):
        image = read_image_file(Path(image))
    if not isinstance(image, bytes | bytearray | memoryview):
        raise BadRecord(
            FaultCause.UNSUPPORTED_IMAGE,
            f"image of type {type(image).__name__}; expected encoded bytes, a path, a PIL image or "
            "an array",
        )
    data = bytes(image)
    try:
        opened = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise BadRecord(FaultCause.TOO_MANY_PIXELS, str(error)) from error
    except Exception as error:  # Pillow's parsers raise any exception on malformed bytes
        raise _unreadable(data, error) from error
    _check_size(opened, max_pixels)
    return (
        LazyJpeg(data, opened)
        if _is_plain_jpeg(opened)
        else _decode_with_pillow(opened, background, data)
    )


def read_image_file(path: Path) -> bytes:
    """Return the bytes of a file. Raises BadRecord unless it is a regular file that can be read."""
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_FILE_BYTES:
            return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: the name contains a zero byte
        raise BadRecord(FaultCause.MISSING_IMAGE, str(error)) from error
    raise BadRecord(
        FaultCause.UNREADABLE_FILE,
        f"{path} has {status.st_size} bytes and mode {stat.filemode(status.st_mode)}; expected a "
        f"regular file of at most {MAX_FILE_BYTES} bytes",
    )


def _is_plain_jpeg(opened: Image.Image) -> bool:
    """Return whether libjpeg-turbo returns Pillow's pixels: no CMYK, rotation or several images."""
    if opened.format != "JPEG" or opened.mode not in ("RGB", "L"):
        return False
    try:
        return opened.getexif().get(ORIENTATION, 1) == 1
    except Exception:  # on malformed EXIF; `_decode_with_pillow` reports it
        return False


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    _check_aspect(width, height)
    if width * height > max_pixels:
        raise BadRecord(
            FaultCause.TOO_MANY_PIXELS,
            f"image of {width}x{height} = {width * height} pixels; expected at most {max_pixels}",
        )


def _check_aspect(width: int, height: int) -> None:
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise BadRecord(
            FaultCause.UNSUPPORTED_IMAGE,
            f"image of {width}x{height}; expected sides whose ratio is at most {MAX_ASPECT_RATIO}",
        )


def _decode_with_pillow(
    image: Image.Image, background: Color, data: bytes = b""
) -> UInt8[np.ndarray, "h w 3"]:
    try:
        image.load()
        return _pil_to_rgb(ImageOps.exif_transpose(image), background)
    except (BadRecord, MemoryError):
        raise
    except Exception as error:  # Pillow's parsers raise any exception on malformed bytes
        raise _unreadable(data, error) from error


def _unreadable(data: bytes, error: Exception) -> BadRecord:
    """Return the BadRecord that classifies a decoder's error."""
    message = f"{type(error).__name__}: {error}"
    # A WebP header contains the file size; the decoder does not report missing bytes.
    short_webp = data[:4] == b"RIFF" and len(data) < int.from_bytes(data[4:8], "little") + 8
    if short_webp or isinstance(error, EOFError) or "truncated" in message.lower():
        return BadRecord(FaultCause.TRUNCATED_IMAGE, f"{message} ({len(data)} bytes)")
    if isinstance(error, UnidentifiedImageError):
        return BadRecord(
            FaultCause.NOT_AN_IMAGE, f"{len(data)} bytes that begin with {data[:12]!r}"
        )
    return BadRecord(FaultCause.UNDECODABLE_IMAGE, message)


def _pil_to_rgb(image: Image.Image, background: Color) -> UInt8[np.ndarray, "h w 3"]:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _scale_16_bit(np.asarray(image))
    if image.mode == "F":
        raise BadRecord(
            FaultCause.UNSUPPORTED_IMAGE, "floating-point pixels; expected 8 or 16 bits"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _scale_16_bit(pixels: Shaped[np.ndarray, "h w"]) -> Image.Image:
    if pixels.min() < 0 or pixels.max() > 65535:
        raise BadRecord(
            FaultCause.UNSUPPORTED_IMAGE, "pixels of more than 16 bits; expected 8 or 16"
        )
    return Image.fromarray(((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _array_to_pil(array: np.ndarray, max_pixels: int) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise BadRecord(
            FaultCause.UNSUPPORTED_IMAGE,
            f"array of shape {array.shape}; expected [h w], [h w 1], [h w 3] or [h w 4]",
        )
    _check_aspect(array.shape[1], array.shape[0])
    if array.shape[0] * array.shape[1] > max_pixels:
        raise BadRecord(
            FaultCause.TOO_MANY_PIXELS,
            f"array of shape {array.shape}; expected at most {max_pixels} pixels",
        )
    if array.dtype == np.uint16:
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8 or array.size == 0:
        raise BadRecord(
            FaultCause.UNSUPPORTED_IMAGE,
            f"array {array.dtype}{list(array.shape)}; expected uint8 or uint16, not empty",
        )
    return Image.fromarray(np.ascontiguousarray(array))
