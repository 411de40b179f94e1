"""A small TFDS (TensorFlow Datasets) data set is written and read without TensorFlow."""

import importlib.util
import json
import os
import pickle
import shutil

import numpy as np
import pytest

from imgtune_jax.data import BadRecord, FaultCause, build_source, decode_image, listing_fingerprint
from imgtune_jax.errors import UserError
from tests.data.tiny_tfds import Tiny


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
    return {
        "name": "tfds", "dataset": "tiny", "split": "train", "data_dir": folder,
        "captions": {"caption": ("captions", "text"), "title": ("title",)},
        "label": ("label",), "group": ("label",),
    }  # fmt: skip


def by_title(source):
    return {source[i].captions["title"][0]: source[i] for i in range(len(source))}


def test_records_have_image_captions_label_and_group(config):
    assert importlib.util.find_spec("tensorflow") is None
    source = build_source(config)
    assert len(source) == 6 and source.caption_sets == ("caption", "title")
    records = by_title(source)
    record = records["title 3"]
    assert record.captions["caption"] == ("caption 3", "Bild 3 狐")
    assert source.class_names == ("odd", "even")
    assert build_source(config | {"label": None}).class_names == ()
    assert build_source(config | {"label": ("title",)}).class_names == ()
    assert record.label == 1 and record.group == records["title 1"].group
    image = decode_image(record.image)
    assert image.shape == (5, 8, 3) and (image == 3).all()
    assert records["title 4"].captions["caption"] == ()


def test_a_truncated_image_is_a_bad_record(config):
    record = by_title(build_source(config))["title 5"]
    with pytest.raises(BadRecord) as caught:
        decode_image(record.image)
    assert caught.value.cause is FaultCause.TRUNCATED_IMAGE


def test_source_can_be_pickled(config):
    source = build_source(config)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint == source.fingerprint
    np.testing.assert_array_equal(decode_image(copy[1].image), decode_image(source[1].image))


def test_splits_can_be_sliced(config):
    assert len(build_source({**config, "split": "train[:50%]"})) == 3


def test_error_names_a_missing_data_set(config, tmp_path):
    with pytest.raises(ValueError, match="no TFDS data set 'absent_thing'"):
        build_source({**config, "dataset": "absent_thing", "data_dir": str(tmp_path)})


@pytest.mark.parametrize("mode", ["stat", "content"])
def test_fingerprint_sees_a_changed_file(config, tmp_path, mode):
    shutil.copytree(config["data_dir"], tmp_path / "copy")
    copied = {**config, "data_dir": str(tmp_path / "copy"), "fingerprint_mode": mode}
    before = build_source(copied)
    digest, listing = before.fingerprint, listing_fingerprint(before)
    (file,) = (tmp_path / "copy").rglob("*train*array_record*")
    data, stat = file.read_bytes(), file.stat()
    file.write_bytes(data.replace(b"caption 3", b"caption 9"))
    assert file.read_bytes() != data
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + (mode == "stat")))
    after = build_source(copied)
    assert after.fingerprint != digest
    assert (listing_fingerprint(after) == listing) == (mode == "stat")


def copy_of(config, tmp_path):
    """Return a config of a copy of the data set, the only shard of the copy, and its info file."""
    folder = tmp_path / "copy"
    shutil.copytree(config["data_dir"], folder)
    (shard,) = folder.rglob("*array_record*")
    (info,) = folder.rglob("dataset_info.json")
    return {**config, "data_dir": str(folder)}, shard, info


def assert_error(config, *parts):
    """Assert that the source is refused, in at most three lines that contain all `parts`."""
    with pytest.raises(UserError) as caught:
        build_source(config)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3 and all(part in message for part in parts), message


@pytest.mark.parametrize("kept", [0, 10, 65_536, -100, -1])
def test_shard_that_is_cut_short_is_named_before_training(config, tmp_path, kept):
    copy, shard, _ = copy_of(config, tmp_path)
    shard.write_bytes(shard.read_bytes()[:kept])
    assert_error(copy, shard.name, f"({shard.stat().st_size} bytes)", "prepare the data set again")


def test_missing_shard_is_named_before_training(config, tmp_path):
    copy, shard, _ = copy_of(config, tmp_path)
    shard.unlink()
    assert_error(copy, shard.name)


def test_data_in_another_format_name_the_command_that_prepares_them(config, tmp_path):
    copy, _, info = copy_of(config, tmp_path)
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    assert_error(copy, "the format tfrecord", "tfds build tiny --file_format=array_record")


def test_damaged_info_of_a_data_set_is_one_message(config, tmp_path):
    copy, _, info = copy_of(config, tmp_path)
    info.write_text("{")
    assert_error(copy, "expected the name and folder of a prepared data set")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (dict(split="nope"), ["split 'nope'", "Should be one of ['train']"]),
        (dict(split="train[5"), ["split 'train[5'"]),
        (dict(dataset="a b"), ["no TFDS data set 'a b'"]),
        (dict(image=("picture",)), ["no feature 'picture'", "'image', 'captions'"]),
        (dict(captions={"caption": ("captions", "nam")}), ["no feature 'nam'", "['text']"]),
        (dict(captions={"caption": ("captions",)}), ["group of features", "['text']"]),
    ],
)
def test_option_that_does_not_fit_the_data_set_is_named(config, change, parts):
    assert_error({**config, **change}, *parts)


def test_folder_given_as_the_name_of_a_data_set_is_refused(config):
    assert_error({**config, "dataset": config["data_dir"]}, "is a folder; expected the name")


def test_data_set_that_is_not_prepared_names_its_folder(config, tmp_path):
    assert_error({**config, "data_dir": str(tmp_path)}, f"no folder {tmp_path}/tiny/1.0.0")
