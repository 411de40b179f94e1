"""Sources -> records -> batches. NumPy only: neither JAX nor Flax is imported here."""

from imgtune_jax.data.caption_sampler import CaptionSampler
from imgtune_jax.data.feature_store import FeatureStore
from imgtune_jax.data.folder import Folder
from imgtune_jax.data.image import decode_image
from imgtune_jax.data.mixture import Mixture
from imgtune_jax.data.pipeline import NO_END, NumpyBatch, Pipeline
from imgtune_jax.data.record import (
    BadRecord,
    BadRecordCounter,
    Fault,
    FaultCause,
    Record,
    Source,
    TooManyBadRecordsError,
    read_metadata,
)
from imgtune_jax.data.sources import SOURCES, build_source
from imgtune_jax.data.tfds import TFDS
from imgtune_jax.data.tokenizer import Tokenizer, build_tokenizer, load_tokenizer, train_tokenizer
from imgtune_jax.data.transforms import (
    TRANSFORMS,
    TRANSFORMS_VERSION,
    Compose,
    Transform,
    build_transform,
)
from imgtune_jax.data.webdataset import WebDataset

__all__ = [
    "NO_END",
    "SOURCES",
    "TFDS",
    "TRANSFORMS",
    "TRANSFORMS_VERSION",
    "BadRecord",
    "BadRecordCounter",
    "CaptionSampler",
    "Compose",
    "Fault",
    "FaultCause",
    "FeatureStore",
    "Folder",
    "Mixture",
    "NumpyBatch",
    "Pipeline",
    "Record",
    "Source",
    "Tokenizer",
    "TooManyBadRecordsError",
    "Transform",
    "WebDataset",
    "build_source",
    "build_tokenizer",
    "build_transform",
    "decode_image",
    "load_tokenizer",
    "read_metadata",
    "train_tokenizer",
]
