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


def pillow(pixels, height, width, interpolation):
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((width, height), INTERPOLATIONS[interpolation])).astype(int)


@pytest.mark.parametrize("window", [(0, 0, 360, 480), (7, 31, 300, 211), (50, 60, 40, 33)])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_window_is_resized_as_pillow_resizes_it(window, interpolation):
    """To a rounding. Both keep 8 bits between rows and columns, and may take either first."""
    top, left, h, w = window
    for pixels in (SMOOTH, RNG.integers(0, 256, SMOOTH.shape, dtype=np.uint8)):
        part = pixels[top : top + h, left : left + w]
        found = crop_and_resize(pixels, window, 96, 128, interpolation)
        rows_first = pillow(part, 96, 128, interpolation)
        columns_first = pillow(part.swapaxes(0, 1), 128, 96, interpolation).swapaxes(0, 1)
        off = min((np.abs(found - x) for x in (rows_first, columns_first)), key=np.mean)
        assert off.max() <= 2 and off.mean() < 0.05


def test_a_window_with_fractions_is_cut_at_them():
    """Columns 0..9.5 of a ramp, to one pixel: the mean of what lies under the filter."""
    ramp = np.broadcast_to(np.arange(0, 200, 10, dtype=np.uint8)[None, :, None], (8, 20, 3))
    whole = crop_and_resize(ramp, (0, 0, 8, 9), 1, 1, "bilinear")[0, 0, 0]
    part = crop_and_resize(ramp, (0, 0, 8, 9.5), 1, 1, "bilinear")[0, 0, 0]
    more = crop_and_resize(ramp, (0, 0, 8, 10), 1, 1, "bilinear")[0, 0, 0]
    assert whole < part < more


def test_an_undecoded_jpeg_gives_the_pixels_of_a_decoded_one():
    data = jpeg(SMOOTH)
    crop = {"name": "random_resized_crop", "size": 100}
    flip = {"name": "horizontal_flip"}
    exact = [
        {"name": "resize", "size": 90, "mode": "shortest"},
        {"name": "center_crop", "size": 80},
    ]
    for configs in ([crop, flip], [flip, crop], exact, []):
        transform = build_transform(configs)
        for seed in range(5):
            found = transform(open_image(data), np.random.default_rng(seed))
            want = transform(decode_image(data), np.random.default_rng(seed))
            np.testing.assert_array_equal(found, want)


def test_a_jpeg_is_reduced_only_where_its_window_keeps_twice_the_size():
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
    assert [crop.reduction(*w) for w in windows] == [1, 1, 2, 2, 4, 8, 8]
    assert RandomResizedCrop(32, scaled_decode=False).reduction(4096, 4096) == 1


def test_scaled_decode_changes_less_than_another_interpolation(monkeypatch):
    data, seen = jpeg(SMOOTH), []
    plain = LazyJpeg.decode
    monkeypatch.setattr(
        LazyJpeg, "decode", lambda s, r=1, **kw: seen.append(r) or plain(s, r, **kw)
    )

    def crops(**fields):
        crop = RandomResizedCrop(40, scale=(0.5, 1.0), **fields)
        rngs = [np.random.default_rng(seed) for seed in range(20)]
        found = np.array([crop(open_image(data), rng) for rng in rngs]).astype(int)
        return found, [rng.random() for rng in rngs]

    reduced, drawn = crops()
    assert set(seen) == {2, 4}
    seen.clear()
    whole, drawn_whole = crops(scaled_decode=False)
    assert set(seen) == {1} and drawn == drawn_whole
    bilinear, _ = crops(scaled_decode=False, interpolation="bilinear")
    assert 0 < np.abs(reduced - whole).mean() < np.abs(bilinear - whole).mean()


def test_pictures_share_no_memory():
    """Also where the window needs no resize, though both were decoded into one place."""
    crop = RandomResizedCrop((360, 480), scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3))
    pictures = [SMOOTH, SMOOTH[::-1]]
    found = [crop(open_image(jpeg(x)), np.random.default_rng(0)) for x in pictures]
    for one, picture in zip(found, pictures, strict=True):
        np.testing.assert_array_equal(one, decode_image(jpeg(picture)))


def test_threads_do_not_disturb_each_other():
    crop, data = RandomResizedCrop(64), [jpeg(np.roll(SMOOTH, 9 * i, 1)) for i in range(8)]
    jobs = [(data[i % 8], i) for i in range(200)]

    def run(job):
        return crop(open_image(job[0]), np.random.default_rng(job[1]))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, jobs))
    for job, one in zip(jobs, found, strict=True):
        np.testing.assert_array_equal(one, run(job))
