import io

import numpy as np
import pytest
from PIL import Image

from imgtune_jax.data import BadRecord, Cause, decode

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (60, 80, 3), dtype=np.uint8)


def encode(image, kind, **options):
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, kind, **options)
    return out.getvalue()


def cause_of(image, **options):
    with pytest.raises(BadRecord) as caught:
        decode(image, **options)
    return caught.value.cause


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_truncated_images_are_called_truncated(kind, kept):
    data = encode(PIXELS, kind)
    assert cause_of(data[: int(len(data) * kept)]) is Cause.TRUNCATED_IMAGE


@pytest.mark.parametrize("data", [b"", b"hello", b"<html>404</html>", bytes(5000)])
def test_other_bytes_are_not_an_image(data):
    assert cause_of(data) is Cause.NOT_AN_IMAGE


def test_damaged_image_is_undecodable():
    data = bytearray(encode(PIXELS, "PNG"))
    data[200:260] = bytes(60)
    assert cause_of(bytes(data)) is Cause.UNDECODABLE_IMAGE


def test_bomb_is_refused_by_its_header(monkeypatch):
    bomb = encode(Image.new("1", (10_000, 10_000)), "PNG")
    assert len(bomb) < 100_000

    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.warns(Image.DecompressionBombWarning):
        assert cause_of(bomb) is Cause.TOO_MANY_PIXELS


def test_limit_of_pixels_is_inclusive():
    data = encode(PIXELS, "PNG")
    assert decode(data, max_pixels=4800).shape == (60, 80, 3)
    assert cause_of(data, max_pixels=4799) is Cause.TOO_MANY_PIXELS
    assert cause_of(PIXELS, max_pixels=4799) is Cause.TOO_MANY_PIXELS
    assert cause_of(Image.fromarray(PIXELS), max_pixels=4799) is Cause.TOO_MANY_PIXELS


def test_rgb_is_exact_however_it_comes(tmp_path):
    data = encode(PIXELS, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for image in (data, path, str(path), PIXELS, Image.fromarray(PIXELS), memoryview(data)):
        got = decode(image)
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, PIXELS)


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 20, 30)])
def test_alpha_is_composited_on_the_background(background):
    alpha = np.zeros((60, 80, 1), np.uint8)
    alpha[:, 40:] = 255
    alpha[:30, 20:40] = 128
    rgba = np.concatenate([PIXELS, alpha], axis=2)
    share = alpha / 255
    want = PIXELS * share + np.array(background) * (1 - share)
    for image in (rgba, encode(rgba, "PNG"), encode(rgba, "WEBP", lossless=True, exact=True)):
        got = decode(image, background=background)
        np.testing.assert_allclose(got, want, atol=1)  # integers
        np.testing.assert_array_equal(got[:, 40:], PIXELS[:, 40:])


def test_transparent_palette_and_gray_are_composited():
    palette = Image.fromarray(PIXELS).quantize(8)
    index = np.asarray(palette)
    got = decode(encode(palette, "PNG", transparency=3))
    assert (got[index == 3] == 255).all()
    gray_alpha = Image.merge("LA", [Image.new("L", (4, 4), 7), Image.new("L", (4, 4), 0)])
    assert (decode(encode(gray_alpha, "PNG")) == 255).all()


def test_palette_gray_one_bit_and_cmyk_become_rgb():
    palette = Image.fromarray(PIXELS).quantize(16)
    np.testing.assert_array_equal(decode(encode(palette, "PNG")), palette.convert("RGB"))
    gray = PIXELS[..., 0]
    np.testing.assert_array_equal(decode(encode(gray, "PNG")), np.stack([gray] * 3, -1))
    np.testing.assert_array_equal(decode(gray[..., None]), np.stack([gray] * 3, -1))
    bits = gray > 127
    np.testing.assert_array_equal(decode(bits)[..., 0], bits * 255)
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    np.testing.assert_array_equal(decode(encode(cmyk, "TIFF"))[0, 0], (255, 0, 0))


def test_sixteen_bits_are_scaled_not_clipped():
    deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    want = np.round(deep / 257)
    for image in (encode(deep, "PNG"), encode(deep, "TIFF"), deep, Image.fromarray(deep)):
        np.testing.assert_array_equal(decode(image)[..., 1], want)


def test_float_pixels_are_refused():
    assert cause_of(PIXELS / 255) is Cause.UNSUPPORTED_IMAGE
    assert cause_of(Image.new("F", (4, 4))) is Cause.UNSUPPORTED_IMAGE
    assert cause_of(np.zeros((4, 4, 2), np.uint8)) is Cause.UNSUPPORTED_IMAGE
    assert cause_of(np.zeros((0, 4, 3), np.uint8)) is Cause.UNSUPPORTED_IMAGE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255  # white in the upper left corner
    # Stored such that the tag's operation brings it back: the table of the EXIF specification.
    undo = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(np.ascontiguousarray(undo(upright)), "PNG", exif=exif)
    np.testing.assert_array_equal(decode(data), upright)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decode(data) == (255, 0, 0)).all()


def test_missing_image_and_missing_file(tmp_path):
    assert cause_of(None) is Cause.MISSING_IMAGE
    assert cause_of(tmp_path / "no.png") is Cause.MISSING_IMAGE
