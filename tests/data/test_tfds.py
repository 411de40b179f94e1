"""A small TFDS (TensorFlow Datasets) data set is written and read without TensorFlow."""

import importlib.util
import io
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from imgtune_jax.data import BadRecord, FaultCause, build_source, decode_image


class Tiny(tfds.core.GeneratorBasedBuilder):
    """Six records. Record 4 has no captions, and the image of record 5 is a truncated BMP."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
                "title": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["odd", "even"]),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(6):
            out = io.BytesIO()
            Image.new("RGB", (8, 5), (i, i, i)).save(out, "BMP" if i == 5 else "PNG")
            data = io.BytesIO(out.getvalue()[: 100 if i == 5 else None])
            texts = [f"caption {i}", f"Bild {i} 狐"][: 0 if i == 4 else 2]
            yield (
                i,
                {
                    "image": data,
                    "captions": {"text": texts},
                    "title": f"title {i}",
                    "label": i % 2,
                },
            )


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
    assert record.label == 1 and record.group == records["title 1"].group
    image = decode_image(record.image)
    assert image.shape == (5, 8, 3) and (image == 3).all()
    assert records["title 4"].captions["caption"] == ()


def test_a_truncated_image_is_a_bad_record(config):
    record = by_title(build_source(config))["title 5"]
    with pytest.raises(BadRecord) as caught:
        decode_image(record.image)
    assert caught.value.cause is FaultCause.TRUNCATED_IMAGE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": {"caption": ("captions",)}}, "ends in a group of features; .* text"),
        ({"captions": {"caption": ("captions", "txt")}}, "has no 'txt'; .* text"),
        ({"captions": {"caption": ("title", "en")}}, "has no 'en'"),
        ({"image": ("captions",)}, "ends in a group of features; .* text"),
        ({"label": ("lable",)}, "has no 'lable'; .* features image, captions, title"),
        ({"group": ("captions",)}, "ends in a group of features; .* text"),
    ],
)
def test_path_to_no_feature_or_to_a_group_is_an_error_that_lists_the_features(
    config, changes, message
):
    """The names of the features of a group are no captions."""
    with pytest.raises(ValueError, match=message):
        build_source({**config, **changes})


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
