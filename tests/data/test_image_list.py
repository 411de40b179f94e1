"""Images that a caller gives, as a source."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgtune_jax.data import BadRecord, ImageList, decode_image
from imgtune_jax.errors import MissingFileError, UserError

PIXELS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


class ArrayLike:
    """An array of another library."""

    def __array__(self, dtype=None, copy=None):
        return PIXELS


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path)
    return path


def test_every_kind_of_image_has_the_same_pixels(file):
    kinds = [file, str(file), file.read_bytes(), PIXELS, Image.fromarray(PIXELS), ArrayLike()]
    for image in kinds:
        for source in (ImageList.from_images(image), ImageList.from_images([image])):
            assert len(source) == 1
            np.testing.assert_array_equal(decode_image(source[0].image), PIXELS)


def test_every_iterable_gives_its_images_in_order(file):
    for images in (
        [file, file],
        (x for x in (file, file)),
        iter([file, file]),
        dict.fromkeys([file, str(file)]),
        np.array([str(file)] * 2),
        np.stack([PIXELS, PIXELS]),
        itertools.repeat(file, 2),
    ):
        assert len(ImageList.from_images(images)) == 2


@pytest.mark.parametrize("images", [[], (), iter([]), np.zeros((0, 2, 2, 3), np.uint8)])
def test_no_images_are_an_error(images):
    with pytest.raises(UserError, match="no images given"):
        ImageList.from_images(images)


def test_value_that_is_no_image_is_named(file, tmp_path):
    with pytest.raises(UserError, match="image 1 is a int; expected a path"):
        ImageList.from_images([file, 10**12])
    with pytest.raises(MissingFileError, match="a folder; expected the path of an image"):
        ImageList.from_images(tmp_path)
    for path in (tmp_path / "gone.png", "x" * 5000 + ".png", "a\0.png"):
        with pytest.raises(MissingFileError, match="no file; expected the path of an image"):
            ImageList.from_images(path)


def test_fingerprint_depends_on_the_bytes_of_the_images(file):
    first = ImageList.from_images(file).fingerprint
    assert ImageList.from_images(file.read_bytes()).fingerprint == first
    Image.fromarray(PIXELS[::-1]).save(file)
    assert ImageList.from_images(Path(file)).fingerprint != first


def test_file_that_cannot_be_read_is_a_bad_record_with_its_cause(file, caplog):
    source = ImageList.from_images([file, PIXELS])
    file.unlink()
    with pytest.raises(BadRecord, match=r"missing_image.*No such file"):
        decode_image(source[0].image)
    source.check_readable(np.array([False, True]), skip_unreadable=True)
    assert "skipped 1 of 2 images" in caplog.text and f"{file}: missing_image" in caplog.text
    for valid, skip in (([False, True], False), ([False, False], True)):
        with pytest.raises(UserError, match=r"these images cannot be read:\n .*missing_image"):
            source.check_readable(np.array(valid), skip_unreadable=skip)
