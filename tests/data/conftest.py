import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from imgtune_jax.data import build_source, build_transform, train_tokenizer


def encode(value, kind="PNG", size=(20, 16), mode="RGB"):
    """A picture whose pixels are all `value`, with noise so that it cannot be cut unseen."""
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[:4, :4] = value
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


def write_tar(path, files):
    """A tar of {name: bytes}."""
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def good_files(n):
    """{name: bytes} of n whole records."""
    files = {}
    for i in range(n):
        meta = {"name": f"thing number {i}", "keywords": [f"key {i}", "thing"], "group": i // 2}
        files[f"{i:03d}.png"] = encode(i)
        files[f"{i:03d}.json"] = json.dumps(meta).encode()
    return files


def source_of(path):
    """The tar as a source with two caption sets and groups."""
    return build_source(
        {"name": "webdataset", "path": path, "group": ("group",),
         "captions": {"name": ("name",), "keywords": ("keywords",)}}
    )  # fmt: skip


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """37 whole records."""
    return source_of(write_tar(tmp_path_factory.mktemp("tars") / "good.tar", good_files(37)))


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
