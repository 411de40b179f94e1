import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from imgtune_jax.data import build_transform, decode_image
from imgtune_jax.data.crops import RandomResizedCrop
from imgtune_jax.data.image import LazyJpeg, open_image
from imgtune_jax.data.resample import INTERPOLATIONS, crop_and_resize

RNG = np.random.default_rng(0)
SMOOTH = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (18, 24, 3), dtype=np.uint8)).resize((480, 360))
)


def jpeg(pixels, **options):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90, **options)
    return out.getvalue()


def resize_with_pillow(pixels, height, width, interpolation):
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((width, height), INTERPOLATIONS[interpolation])).astype(int)


@pytest.mark.parametrize("box", [(0, 0, 360, 480), (7, 31, 300, 211), (50, 60, 40, 33)])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_crop_and_resize_equals_pillow_up_to_rounding(box, interpolation):
    """Each resizes one axis, rounds to 8 bits, and resizes the other; the first axis may differ."""
    top, left, h, w = box
    for pixels in (SMOOTH, RNG.integers(0, 256, SMOOTH.shape, dtype=np.uint8)):
        window = pixels[top : top + h, left : left + w]
        resized = crop_and_resize(pixels, box, 96, 128, interpolation)
        rows_first = resize_with_pillow(window, 96, 128, interpolation)
        columns_first = resize_with_pillow(window.swapaxes(0, 1), 128, 96, interpolation)
        columns_first = columns_first.swapaxes(0, 1)
        errors = [np.abs(resized - expected) for expected in (rows_first, columns_first)]
        error = min(errors, key=np.mean)
        assert error.max() <= 2 and error.mean() < 0.05


def test_a_fractional_window_includes_a_part_of_its_edge_pixels():
    """Columns 0 to 9.5 of a ramp are resized to one pixel, which is their weighted mean."""
    ramp = np.broadcast_to(np.arange(0, 200, 10, dtype=np.uint8)[None, :, None], (8, 20, 3))
    nine = crop_and_resize(ramp, (0, 0, 8, 9), 1, 1, "bilinear")[0, 0, 0]
    nine_and_half = crop_and_resize(ramp, (0, 0, 8, 9.5), 1, 1, "bilinear")[0, 0, 0]
    ten = crop_and_resize(ramp, (0, 0, 8, 10), 1, 1, "bilinear")[0, 0, 0]
    assert nine < nine_and_half < ten


def test_transforms_of_a_lazy_and_of_a_decoded_jpeg_are_equal():
    data = jpeg(SMOOTH)
    crop = {"name": "random_resized_crop", "size": 100}
    flip = {"name": "horizontal_flip"}
    deterministic = [
        {"name": "resize", "size": 90, "mode": "shortest"},
        {"name": "center_crop", "size": 80},
    ]
    for configs in ([crop, flip], [flip, crop], deterministic, []):
        transform = build_transform(configs)
        for seed in range(5):
            lazy = transform(open_image(data), np.random.default_rng(seed))
            decoded = transform(decode_image(data), np.random.default_rng(seed))
            np.testing.assert_array_equal(lazy, decoded)


def test_a_jpeg_is_reduced_only_if_its_window_still_has_twice_the_size():
    crop = RandomResizedCrop((32, 64))
    windows = [
        (127, 999),
        (999, 255),
        (128, 256),
        (255, 600),
        (256, 512),
        (512, 1024),
        (4096, 4096),
    ]
    assert [crop.reduction(*window) for window in windows] == [1, 1, 2, 2, 4, 8, 8]
    assert RandomResizedCrop(32, scaled_decode=False).reduction(4096, 4096) == 1


def test_scaled_decode_changes_less_than_another_interpolation(monkeypatch):
    data, reductions = jpeg(SMOOTH), []
    original_decode = LazyJpeg.decode

    def record_reduction(self, reduction=1, **options):
        reductions.append(reduction)
        return original_decode(self, reduction, **options)

    monkeypatch.setattr(LazyJpeg, "decode", record_reduction)

    def crops(**fields):
        crop = RandomResizedCrop(40, scale=(0.5, 1.0), **fields)
        rngs = [np.random.default_rng(seed) for seed in range(20)]
        cropped = np.array([crop(open_image(data), rng) for rng in rngs]).astype(int)
        return cropped, [rng.random() for rng in rngs]

    reduced, next_random = crops()
    assert set(reductions) == {2, 4}
    reductions.clear()
    full, next_random_full = crops(scaled_decode=False)
    assert set(reductions) == {1} and next_random == next_random_full
    bilinear, _ = crops(scaled_decode=False, interpolation="bilinear")
    assert 0 < np.abs(reduced - full).mean() < np.abs(bilinear - full).mean()


def test_images_share_no_memory():
    """Not even if no resize is needed, although both images are decoded into one buffer."""
    crop = RandomResizedCrop((360, 480), scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3))
    images = [SMOOTH, SMOOTH[::-1]]
    crops = [crop(open_image(jpeg(image)), np.random.default_rng(0)) for image in images]
    for cropped, image in zip(crops, images, strict=True):
        np.testing.assert_array_equal(cropped, decode_image(jpeg(image)))


def test_crops_in_threads_equal_crops_in_one_thread():
    crop, data = RandomResizedCrop(64), [jpeg(np.roll(SMOOTH, 9 * i, 1)) for i in range(8)]
    jobs = [(data[i % 8], i) for i in range(200)]

    def crop_image(job):
        jpeg_bytes, seed = job
        return crop(open_image(jpeg_bytes), np.random.default_rng(seed))

    with ThreadPoolExecutor(4) as pool:
        crops = list(pool.map(crop_image, jobs))
    for job, cropped in zip(jobs, crops, strict=True):
        np.testing.assert_array_equal(cropped, crop_image(job))
