"""Sources -> records -> batches. NumPy only: neither JAX nor Flax is imported here."""

from imgtune_jax.data.captions import CaptionDraw
from imgtune_jax.data.folder import Folder
from imgtune_jax.data.image import decode
from imgtune_jax.data.mixture import Mixture
from imgtune_jax.data.pipeline import ENDLESS, NumpyBatch, Pipeline
from imgtune_jax.data.record import (
    BadRecord,
    BadRecordCounter,
    Cause,
    Fault,
    Record,
    Source,
    TooManyBadRecords,
    describe,
)
from imgtune_jax.data.sources import SOURCES, build_source
from imgtune_jax.data.store import FeatureStore
from imgtune_jax.data.text import Tokenizer, build_tokenizer, load_tokenizer, train_tokenizer
from imgtune_jax.data.tfds import TFDS
from imgtune_jax.data.transforms import PIXELS, TRANSFORMS, Compose, Transform, build_transform
from imgtune_jax.data.webdataset import WebDataset

__all__ = [
    "ENDLESS",
    "PIXELS",
    "SOURCES",
    "TFDS",
    "TRANSFORMS",
    "BadRecord",
    "BadRecordCounter",
    "CaptionDraw",
    "Cause",
    "Compose",
    "Fault",
    "FeatureStore",
    "Folder",
    "Mixture",
    "NumpyBatch",
    "Pipeline",
    "Record",
    "Source",
    "Tokenizer",
    "TooManyBadRecords",
    "Transform",
    "WebDataset",
    "build_source",
    "build_tokenizer",
    "build_transform",
    "decode",
    "describe",
    "load_tokenizer",
    "train_tokenizer",
]
