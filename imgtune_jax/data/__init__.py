"""Sources, records and batches, in NumPy. This package imports neither JAX nor Flax."""

from imgtune_jax.data.caption_sampler import CaptionSampler
from imgtune_jax.data.feature_store import FeatureStore
from imgtune_jax.data.folder import Folder
from imgtune_jax.data.image import IMAGE_SUFFIXES, decode_image
from imgtune_jax.data.image_list import ImageList
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
    class_names,
    listing_fingerprint,
    read_metadata,
)
from imgtune_jax.data.sources import SOURCES, build_source
from imgtune_jax.data.subset import Subset, evenly_spaced
from imgtune_jax.data.tfds import TFDS
from imgtune_jax.data.tokenizer import Tokenizer
from imgtune_jax.data.tokenizer_files import build_tokenizer, load_tokenizer
from imgtune_jax.data.train_tokenizer import train_tokenizer
from imgtune_jax.data.transforms import (
    TRANSFORMS,
    TRANSFORMS_VERSION,
    Compose,
    Transform,
    build_transform,
    output_shape,
)
from imgtune_jax.data.webdataset import WebDataset

__all__ = [
    "IMAGE_SUFFIXES",
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
    "ImageList",
    "Mixture",
    "NumpyBatch",
    "Pipeline",
    "Record",
    "Source",
    "Subset",
    "Tokenizer",
    "TooManyBadRecordsError",
    "Transform",
    "WebDataset",
    "build_source",
    "build_tokenizer",
    "build_transform",
    "class_names",
    "decode_image",
    "evenly_spaced",
    "listing_fingerprint",
    "load_tokenizer",
    "output_shape",
    "read_metadata",
    "train_tokenizer",
]
