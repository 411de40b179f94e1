"""The definition of a small TFDS (TensorFlow Datasets) data set."""

import io

import tensorflow_datasets as tfds
from PIL import Image


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
