import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from imgtune_jax.data import build_source, build_transform, train_tokenizer


def encode(value, kind="PNG", size=(20, 16), mode="RGB"):
    """Encode a noise image with a patch of `value`; the noise makes any truncation detectable."""
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
    """Return a source of the tar with two caption sets and groups."""
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
