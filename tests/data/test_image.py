import io
import os

import numpy as np
import pytest
from PIL import Image

from imgtune_jax.data import BadRecord, FaultCause, decode_image
from imgtune_jax.data.image import LazyJpeg, open_image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (60, 80, 3), dtype=np.uint8)


def encode(image, kind, **options):
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, kind, **options)
    return out.getvalue()


def cause_of(image, **options):
    with pytest.raises(BadRecord) as caught:
        decode_image(image, **options)
    return caught.value.cause


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("fraction", [0.3, 0.9])
def test_truncated_images_are_classified_as_truncated(kind, fraction):
    data = encode(PIXELS, kind)
    assert cause_of(data[: int(len(data) * fraction)]) is FaultCause.TRUNCATED_IMAGE


@pytest.mark.parametrize("data", [b"", b"hello", b"<html>404</html>", bytes(5000)])
def test_other_bytes_are_classified_as_not_an_image(data):
    assert cause_of(data) is FaultCause.NOT_AN_IMAGE


def test_damaged_images_are_classified_as_undecodable():
    data = bytearray(encode(PIXELS, "PNG"))
    data[200:260] = bytes(60)
    assert cause_of(bytes(data)) is FaultCause.UNDECODABLE_IMAGE


def test_decompression_bomb_is_rejected_from_its_header(monkeypatch):
    bomb = encode(Image.new("1", (10_000, 10_000)), "PNG")
    assert len(bomb) < 100_000

    def load(self):
        raise AssertionError("the image was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.warns(Image.DecompressionBombWarning):
        assert cause_of(bomb) is FaultCause.TOO_MANY_PIXELS


def test_pixel_limit_is_inclusive():
    data = encode(PIXELS, "PNG")
    assert decode_image(data, max_pixels=4800).shape == (60, 80, 3)
    assert cause_of(data, max_pixels=4799) is FaultCause.TOO_MANY_PIXELS
    assert cause_of(PIXELS, max_pixels=4799) is FaultCause.TOO_MANY_PIXELS
    assert cause_of(Image.fromarray(PIXELS), max_pixels=4799) is FaultCause.TOO_MANY_PIXELS


def test_every_kind_of_input_returns_the_same_rgb(tmp_path):
    data = encode(PIXELS, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for image in (data, path, str(path), PIXELS, Image.fromarray(PIXELS), memoryview(data)):
        decoded = decode_image(image)
        assert decoded.dtype == np.uint8
        np.testing.assert_array_equal(decoded, PIXELS)


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 20, 30)])
def test_alpha_is_composited_on_the_background(background):
    alpha = np.zeros((60, 80, 1), np.uint8)
    alpha[:, 40:] = 255
    alpha[:30, 20:40] = 128
    rgba = np.concatenate([PIXELS, alpha], axis=2)
    opacity = alpha / 255
    expected = PIXELS * opacity + np.array(background) * (1 - opacity)
    for image in (rgba, encode(rgba, "PNG"), encode(rgba, "WEBP", lossless=True, exact=True)):
        decoded = decode_image(image, background=background)
        np.testing.assert_allclose(decoded, expected, atol=1)  # rounded to integers
        np.testing.assert_array_equal(decoded[:, 40:], PIXELS[:, 40:])


def test_transparent_palette_and_gray_are_composited():
    palette = Image.fromarray(PIXELS).quantize(8)
    index = np.asarray(palette)
    decoded = decode_image(encode(palette, "PNG", transparency=3))
    assert (decoded[index == 3] == 255).all()
    gray_alpha = Image.merge("LA", [Image.new("L", (4, 4), 7), Image.new("L", (4, 4), 0)])
    assert (decode_image(encode(gray_alpha, "PNG")) == 255).all()


def test_palette_gray_one_bit_and_cmyk_become_rgb():
    palette = Image.fromarray(PIXELS).quantize(16)
    np.testing.assert_array_equal(decode_image(encode(palette, "PNG")), palette.convert("RGB"))
    gray = PIXELS[..., 0]
    np.testing.assert_array_equal(decode_image(encode(gray, "PNG")), np.stack([gray] * 3, -1))
    np.testing.assert_array_equal(decode_image(gray[..., None]), np.stack([gray] * 3, -1))
    bits = gray > 127
    np.testing.assert_array_equal(decode_image(bits)[..., 0], bits * 255)
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # full magenta and yellow: red
    np.testing.assert_array_equal(decode_image(encode(cmyk, "TIFF"))[0, 0], (255, 0, 0))


def test_sixteen_bit_values_are_scaled_and_not_clipped():
    pixels = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    expected = np.round(pixels / 257)
    for image in (encode(pixels, "PNG"), encode(pixels, "TIFF"), pixels, Image.fromarray(pixels)):
        np.testing.assert_array_equal(decode_image(image)[..., 1], expected)


def test_unsupported_pixel_types_and_shapes_are_rejected():
    assert cause_of(PIXELS / 255) is FaultCause.UNSUPPORTED_IMAGE
    assert cause_of(Image.new("F", (4, 4))) is FaultCause.UNSUPPORTED_IMAGE
    assert cause_of(np.zeros((4, 4, 2), np.uint8)) is FaultCause.UNSUPPORTED_IMAGE
    assert cause_of(np.zeros((0, 4, 3), np.uint8)) is FaultCause.UNSUPPORTED_IMAGE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255  # white in the upper left corner
    # By orientation tag: the inverse of the operation in the table of the EXIF specification.
    inverse = {
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
    data = encode(np.ascontiguousarray(inverse(upright)), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(data), upright)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation_is_used(kind):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decode_image(data) == (255, 0, 0)).all()


def test_missing_images_and_files_are_classified_as_missing(tmp_path):
    assert cause_of(None) is FaultCause.MISSING_IMAGE
    assert cause_of(tmp_path / "no.png") is FaultCause.MISSING_IMAGE


SMOOTH = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (12, 17, 3), dtype=np.uint8)).resize((131, 93))
)
JPEGS = {
    "4:2:0": encode(SMOOTH, "JPEG", subsampling="4:2:0"),
    "4:2:2": encode(SMOOTH, "JPEG", subsampling="4:2:2"),
    "4:4:4": encode(SMOOTH, "JPEG", subsampling="4:4:4", quality=98),
    "progressive": encode(SMOOTH, "JPEG", progressive=True),
    "stored as RGB": encode(SMOOTH, "JPEG", keep_rgb=True),
    "gray": encode(np.ascontiguousarray(SMOOTH[..., 0]), "JPEG"),
    "cmyk": encode(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG"),
}


def decode_with_pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg_pixels_are_bit_identical_to_those_of_pillow(kind):
    assert isinstance(open_image(JPEGS[kind]), LazyJpeg) == (kind != "cmyk")
    np.testing.assert_array_equal(decode_image(JPEGS[kind]), decode_with_pillow(JPEGS[kind]))


def test_damaged_jpegs_that_pillow_decodes_are_decoded():
    data = bytearray(JPEGS["4:2:0"])
    data[-60:-50] = bytes(10)
    expected = decode_with_pillow(bytes(data))
    assert (expected != decode_with_pillow(JPEGS["4:2:0"])).any()
    np.testing.assert_array_equal(decode_image(bytes(data)), expected)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_jpegs_with_exif_rotation_become_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(SMOOTH, "JPEG", exif=exif)
    turns = {1: 0, 3: 2, 6: 3}[orientation]  # counterclockwise quarter turns
    np.testing.assert_array_equal(decode_image(data), np.rot90(decode_with_pillow(data), turns))


def test_jpegs_with_xmp_rotation_become_upright():
    xmp = b'http://ns.adobe.com/xap/1.0/\0<rdf:Description tiff:Orientation="6"/>'
    app1 = b"\xff\xe1" + (len(xmp) + 2).to_bytes(2) + xmp
    data = JPEGS["4:2:0"][:2] + app1 + JPEGS["4:2:0"][2:]
    np.testing.assert_array_equal(decode_image(data), np.rot90(decode_image(JPEGS["4:2:0"]), 3))


def test_first_of_several_images_in_a_jpeg_is_used():
    other = Image.fromarray(SMOOTH[::-1].copy())
    data = encode(SMOOTH, "MPO", save_all=True, append_images=[other])
    assert not isinstance(open_image(data), LazyJpeg)
    np.testing.assert_array_equal(decode_image(data), decode_with_pillow(data))
    assert np.abs(decode_image(data).astype(int) - SMOOTH).mean() < 5


def test_jpeg_with_too_many_pixels_is_rejected_from_its_header(monkeypatch):
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *a, **k: pytest.fail("decoded"))
    assert cause_of(JPEGS["4:2:0"], max_pixels=93 * 131 - 1) is FaultCause.TOO_MANY_PIXELS


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_reduced_jpeg_approximates_the_mean_of_its_pixels(reduction):
    data = JPEGS["4:4:4"]
    reduced = open_image(data).decode(reduction)
    assert reduced.shape == (-(-93 // reduction), -(-131 // reduction), 3)
    h, w = 93 // reduction, 131 // reduction
    full = decode_image(data)[: h * reduction, : w * reduction].astype(float)
    means = full.reshape(h, reduction, w, reduction, 3).mean((1, 3))
    # At 1/8, a pixel is the mean of its 8x8 block, up to the rounding of two color conversions. At
    # 1/2 and 1/4, it is computed from lower frequencies, which only approximate the mean.
    np.testing.assert_allclose(reduced[:h, :w], means, atol=2 if reduction == 8 else 8)
    assert np.abs(reduced[:h, :w] - means).mean() < 1.5


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (4_000_000, 20)])
@pytest.mark.parametrize("as_array", [False, True])
def test_an_extremely_thin_image_is_a_bad_record(size, as_array):
    """To resize its shorter side to 224 pixels would allocate 9 GB, for a file of 138 bytes."""
    image = Image.new("1", size)
    out = io.BytesIO()
    image.save(out, "PNG")
    with pytest.raises(BadRecord) as caught:
        decode_image(np.asarray(image) if as_array else out.getvalue())
    assert caught.value.cause is FaultCause.UNSUPPORTED_IMAGE
    assert "expected sides whose ratio is at most 200" in caught.value.detail


def test_a_thin_image_within_the_limit_is_decoded():
    assert decode_image(Image.new("RGB", (200, 1))).shape == (1, 200, 3)


@pytest.mark.parametrize("value", [5, 2.0, ["a.png"], object(), iter([])])
def test_a_value_that_is_no_image_is_a_bad_record(value):
    with pytest.raises(BadRecord, match=r"image of type .*; expected encoded bytes, a path"):
        decode_image(value)


def test_a_path_that_is_no_regular_file_is_a_bad_record(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    for path in (tmp_path / "fifo.png", tmp_path, "/dev/zero"):
        with pytest.raises(BadRecord, match="expected a regular file"):
            decode_image(path)
