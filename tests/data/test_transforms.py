import io

import numpy as np
import pytest
from PIL import Image

from imgtune_jax.data import TRANSFORMS, build_transform, color, decode_image, transforms

RNG = np.random.default_rng(0)
WIDE = RNG.integers(0, 256, (61, 97, 3), dtype=np.uint8)
TALL = RNG.integers(0, 256, (97, 40, 3), dtype=np.uint8)
SIZES = [(61, 97), (97, 40), (64, 64), (33, 500), (20, 30), (225, 224)]
EXAMPLES = {
    "resize": {"size": 32},
    "center_crop": {"size": 32},
    "random_crop": {"size": 32, "padding": 4},
    "random_resized_crop": {"size": 32},
    "horizontal_flip": {},
    "color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "grayscale": {"p": 0.5},
    "rotate": {"degrees": 20},
    "pad": {"padding": 3},
    "random_apply": {"p": 0.5, "transforms": [{"name": "rotate", "degrees": 20}]},
}


def rng(seed=0):
    return np.random.default_rng(seed)


def preprocess_like_clip(image, size):
    """Apply torchvision's Resize(size, BICUBIC) and CenterCrop(size) to a PIL image, as CLIP does.

    Transcribed from torchvision.transforms.functional: _compute_resized_output_size, center_crop.
    """
    w, h = image.size
    short, long = (w, h) if w <= h else (h, w)
    new_short, new_long = size, int(size * long / short)
    new_w, new_h = (new_short, new_long) if w <= h else (new_long, new_short)
    image = image.resize((new_w, new_h), Image.Resampling.BICUBIC)
    top, left = round((new_h - size) / 2.0), round((new_w - size) / 2.0)
    return np.asarray(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("size", [224, 57])
def test_resize_and_center_crop_are_bit_identical_to_the_preprocessing_of_clip(shape, size):
    pixels = rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    image = Image.open(io.BytesIO(out.getvalue())).convert("RGB")
    transform = build_transform(
        [{"name": "resize", "size": size, "mode": "shortest", "interpolation": "bicubic"},
         {"name": "center_crop", "size": size}]
    )  # fmt: skip
    pixels = transform(decode_image(out.getvalue()))
    np.testing.assert_array_equal(pixels, preprocess_like_clip(image, size))


def test_random_apply_applies_all_transforms_or_none():
    inner = [{"name": "pad", "padding": 3}, {"name": "center_crop", "size": 32}]
    changed = build_transform(inner)(WIDE)
    for p, expected in ((0.0, WIDE), (1.0, changed)):
        transform = build_transform([{"name": "random_apply", "p": p, "transforms": inner}])
        np.testing.assert_array_equal(transform(WIDE, rng(0)), expected)
    sometimes = build_transform([{"name": "random_apply", "p": 0.5, "transforms": inner}])
    shapes = [sometimes(WIDE, rng(i)).shape for i in range(60)]
    assert set(shapes) == {WIDE.shape, changed.shape}
    assert 15 < shapes.count(WIDE.shape) < 45


def test_every_transform_has_an_example():
    assert set(EXAMPLES) == set(TRANSFORMS)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_pure(name):
    transform = build_transform([{"name": name, **EXAMPLES[name]}])
    for image in (WIDE, TALL):
        before = image.copy()
        first, second = transform(image, rng(5)), transform(image, rng(5))
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(image, before)
        assert first.dtype == np.uint8 and first.ndim == 3 and first.shape[2] == 3


@pytest.mark.parametrize(
    "name",
    ["random_crop", "random_resized_crop", "horizontal_flip", "color_jitter", "grayscale",
     "rotate"],
)  # fmt: skip
def test_random_transforms_vary_and_require_a_generator(name):
    transform = build_transform([{"name": name, **EXAMPLES[name]}])
    assert len({transform(WIDE, rng(seed)).tobytes() for seed in range(8)}) > 1
    with pytest.raises(ValueError, match="call it with rng"):
        transform(WIDE)


def test_resize_modes():
    red = np.full((20, 40, 3), (255, 0, 0), np.uint8)
    assert transforms.Resize(16)(red).shape == (16, 16, 3)
    assert transforms.Resize((8, 24))(red).shape == (8, 24, 3)
    assert transforms.Resize(16, mode="shortest")(red).shape == (16, 32, 3)
    padded = transforms.Resize(16, mode="longest")(red)
    assert padded.shape == (16, 16, 3)
    assert (padded[4:12] == (255, 0, 0)).all()
    assert (padded[:4] == 255).all() and (padded[12:] == 255).all()


def test_resize_is_antialiased():
    """A checkerboard becomes gray, because all pixels contribute, unlike in point sampling."""
    board = np.indices((64, 64)).sum(0) % 2 * 255
    image = np.stack([board] * 3, -1).astype(np.uint8)
    for interpolation in ("bilinear", "bicubic", "lanczos"):
        small = transforms.Resize(8, interpolation=interpolation)(image)
        assert np.abs(small.astype(int) - 127).max() <= 8


def test_center_crop_pads_a_small_image_with_black():
    out = transforms.CenterCrop(10)(np.full((4, 6, 3), 200, np.uint8))
    assert out.shape == (10, 10, 3)
    assert (out[3:7, 2:8] == 200).all() and out.sum() == 200 * 4 * 6 * 3


def test_random_resized_crop_respects_scale_and_ratio():
    crop = transforms.RandomResizedCrop(8, scale=(0.25, 0.5), ratio=(0.8, 1.25))
    generator = rng(0)
    for _ in range(200):
        top, left, h, w = crop._sample_window(120, 100, generator)
        assert top >= 0 and top + h <= 120 and left >= 0 and left + w <= 100
        assert 0.24 <= h * w / 12_000 <= 0.52  # rounded to pixels
        assert 0.78 <= w / h <= 1.28
    # If no allowed window fits, the largest central one with an allowed aspect ratio is used.
    assert crop._sample_window(10, 1000, rng(0))[2:] == (10, 12)


def test_flip_has_its_probability():
    flipped = [transforms.HorizontalFlip(0.25)(WIDE, rng(s))[0, 0, 0] for s in range(400)]
    fraction = np.mean(np.array(flipped) == WIDE[0, -1, 0])
    assert 0.17 < fraction < 0.33
    np.testing.assert_array_equal(transforms.HorizontalFlip(1.0)(WIDE, rng()), WIDE[:, ::-1])
    np.testing.assert_array_equal(transforms.HorizontalFlip(0.0)(WIDE, rng()), WIDE)


def test_color_jitter_without_strengths_is_the_identity():
    np.testing.assert_array_equal(transforms.ColorJitter()(WIDE, rng()), WIDE)
    strong = transforms.ColorJitter(brightness=0.9, p=0.0)
    np.testing.assert_array_equal(strong(WIDE, rng()), WIDE)


def test_hue_shift_by_a_third_turns_red_into_green():
    red = np.full((4, 4, 3), (255, 0, 0), np.uint8)
    shifted = np.asarray(color._shift_hue(Image.fromarray(red), 1 / 3))
    np.testing.assert_allclose(shifted[0, 0], (0, 255, 0), atol=6)  # Pillow's hue has 256 steps


def test_grayscale_has_equal_channels_and_rotation_fills_corners():
    gray = transforms.Grayscale(1.0)(WIDE)
    assert (gray == gray[..., :1]).all()
    black = np.zeros((40, 40, 3), np.uint8)
    rotated = transforms.Rotate(45, fill=(255, 255, 255))(black, rng(3))
    assert (rotated[0, 0] == 255).all() and (rotated[20, 20] == 0).all()


def test_errors_name_invalid_configs():
    with pytest.raises(ValueError, match=r"'blur' is unknown; known: resize"):
        build_transform([{"name": "blur"}])
    with pytest.raises(ValueError, match=r"\['sise'\]; it has size, mode"):
        build_transform([{"name": "resize", "sise": 3}])
    with pytest.raises(ValueError, match="squash, shortest, longest"):
        build_transform([{"name": "resize", "size": 3, "mode": "fit"}])
    with pytest.raises(ValueError, match="size"):
        build_transform([{"name": "center_crop"}])
    with pytest.raises(ValueError, match=r"expected uint8 \[h w 3\]"):
        build_transform([])(WIDE / 255)
