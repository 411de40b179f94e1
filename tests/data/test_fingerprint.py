"""Fingerprints see a changed picture, and the digest of a listing does not change with a copy."""

import os
import shutil
from pathlib import Path

import pytest

from imgtune_jax.data import build_source, listing_fingerprint
from tests.data.conftest import encode, valid_files, write_tar

N = 40  # every second image is sampled by `listing_fingerprint`
CHANGED = 1  # an image that is not sampled
KINDS = ("classes", "table", "tar", "mixture")


def make_source(folder, kind, mode="stat"):
    """Write N records to a folder, if they are not there, and return their source."""
    config = {"fingerprint_mode": mode}
    if kind in ("tar", "mixture"):
        path = folder / "a.tar"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tar(path, valid_files(N))
        config |= {"name": "webdataset", "path": str(path), "captions": {"name": ("name",)}}
        if kind == "mixture":
            config = {"name": "mixture", "sources": (config,)}
        return build_source(config)
    images = folder / "images" / "thing"
    if not images.exists():
        images.mkdir(parents=True)
        for i in range(N):
            (images / f"{i:02d}.bmp").write_bytes(encode(i, "BMP"))
        rows = [f"thing/{i:02d}.bmp,image {i}" for i in range(N)]
        (folder / "t.csv").write_text("\n".join(["filepath,title", *rows]) + "\n")
    config |= {"name": "folder", "path": str(folder / "images")}
    if kind == "table":
        config["table"] = str(folder / "t.csv")
    return build_source(config)


def change_picture(folder, kind, *, keep_time):
    """Replace the pixels of one image by others of equal size."""
    is_tar = kind in ("tar", "mixture")
    path = folder / ("a.tar" if is_tar else f"images/thing/{CHANGED:02d}.bmp")
    data, stat = path.read_bytes(), path.stat()
    kind = "PNG" if is_tar else "BMP"
    picture = bytearray(encode(CHANGED, kind))
    assert data.count(picture) == 1
    changed = picture[:-20] + bytes(b ^ 1 for b in picture[-20:])
    path.write_bytes(data.replace(picture, changed))
    assert path.stat().st_size == stat.st_size and path.read_bytes() != data
    nanoseconds = stat.st_mtime_ns + (0 if keep_time else 1)
    os.utime(path, ns=(stat.st_atime_ns, nanoseconds))


def copy_data(folder, target):
    """Copy all files, with other modification times."""
    shutil.copytree(folder, target)
    for path in Path(target).rglob("*"):
        os.utime(path, (1, 1))


@pytest.mark.parametrize("mode", ["stat", "content"])
@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_sees_a_changed_picture_of_equal_size(tmp_path, kind, mode):
    before = make_source(tmp_path, kind, mode).fingerprint
    assert make_source(tmp_path, kind, mode).fingerprint == before
    change_picture(tmp_path, kind, keep_time=mode == "content")
    assert make_source(tmp_path, kind, mode).fingerprint != before


@pytest.mark.parametrize("kind", KINDS)
def test_digest_of_the_listing_is_that_of_a_copy(tmp_path, kind):
    original = make_source(tmp_path / "a", kind)
    copy_data(tmp_path / "a", tmp_path / "b")
    copy = make_source(tmp_path / "b", kind)
    assert listing_fingerprint(copy) == listing_fingerprint(original)
    assert copy.fingerprint != original.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_content_fingerprint_is_that_of_a_copy(tmp_path, kind):
    original = make_source(tmp_path / "a", kind, "content")
    copy_data(tmp_path / "a", tmp_path / "b")
    copy = make_source(tmp_path / "b", kind, "content")
    assert copy.fingerprint == original.fingerprint == listing_fingerprint(copy)


def test_digest_of_the_listing_sees_names_and_captions(tmp_path):
    before = listing_fingerprint(make_source(tmp_path, "table"))
    table = tmp_path / "t.csv"
    text = table.read_text()
    changes = (text.replace("image 3\n", "image 4\n"), text.replace("03.bmp", "04.bmp"))
    for changed in (*changes, text + "thing/00.bmp,more\n", text + "other.bmp,more\n"):
        table.write_text(changed)
        assert listing_fingerprint(make_source(tmp_path, "table")) != before


def test_file_that_cannot_be_read_is_no_error(tmp_path):
    """It is a bad record, which the pipeline counts."""
    make_source(tmp_path, "table")
    names = ["missing.bmp", "thing", "pipe", "x" * 300, "null\0byte"]
    os.mkfifo(tmp_path / "images" / "pipe")
    lines = ["filepath,title", *(f"{name},t" for name in names)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    for mode in ("stat", "content"):
        source = make_source(tmp_path, "table", mode)
        assert len(source) == len(names) and source.fingerprint


@pytest.mark.parametrize("kind", ["table", "tar"])
def test_unknown_mode_is_an_error(tmp_path, kind):
    with pytest.raises(ValueError, match="fingerprint_mode = 'mtime'; expected 'stat'"):
        make_source(tmp_path, kind, "mtime")
