import io
import itertools
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from imgtune_jax.data import Pipeline, build_source, build_transform, train_tokenizer

BATCH_SIZE = 8


def encode(value, kind="PNG", size=(20, 16), mode="RGB"):
    """Encode an image of noise and a patch of `value`. In noise, any truncation is detectable."""
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[:4, :4] = value
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


def write_tar(path, files, **options):
    """Write a tar of {name: bytes} and return its path."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def valid_files(n):
    """Return {name: bytes} of n valid records."""
    files = {}
    for i in range(n):
        metadata = {"name": f"thing number {i}", "keywords": [f"key {i}", "thing"], "group": i // 2}
        files[f"{i:03d}.png"] = encode(i)
        files[f"{i:03d}.json"] = json.dumps(metadata).encode()
    return files


def build_tar_source(path):
    """Return a source of the tar, with two caption sets and with groups."""
    return build_source(
        {"name": "webdataset", "path": path, "group": ("group",),
         "captions": {"name": ("name",), "keywords": ("keywords",)}}
    )  # fmt: skip


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A source of 37 valid records."""
    path = tmp_path_factory.mktemp("tars") / "valid.tar"
    return build_tar_source(write_tar(path, valid_files(37)))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A small byte-level tokenizer."""
    texts = [f"thing number {i} key" for i in range(40)]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tok"), vocab_size=280, length=12)


@pytest.fixture(scope="session")
def augment():
    """A random transform."""
    return build_transform(
        [{"name": "random_resized_crop", "size": 12}, {"name": "horizontal_flip"}]
    )


@pytest.fixture
def make_pipeline(source, tokenizer, augment):
    """A function that builds a pipeline of the valid source, with some fields changed."""

    def build(**changes):
        fields = dict(
            source=source, transform=augment, tokenizer=tokenizer, batch_size=BATCH_SIZE, seed=3,
            caption_weights={"name": 0.6, "keywords": 0.4}, shuffle=True, num_threads=2, prefetch=2,
        )  # fmt: skip
        return Pipeline(**(fields | changes))

    return build


def host_rows(host, hosts):
    """Return the rows of a batch on one of several hosts that share it equally."""
    size = BATCH_SIZE // hosts
    return tuple(range(host * size, (host + 1) * size))


def take(pipeline, start, count):
    """Return the batches start, …, start + count - 1."""
    iterator = pipeline.batches(start)
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def assert_batches_equal(batches, expected):
    """Assert that two lists of batches have equal keys, types and values."""
    assert len(batches) == len(expected)
    for a, b in zip(batches, expected, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype, key
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
