"""Towers, heads and the models made of them. The only room that imports flax.linen."""

from imgtune_jax.models.build import (
    DECODERS,
    HEADS,
    POOLERS,
    TOWERS,
    ModelFields,
    abstract_tower,
    build,
    build_tower,
)
from imgtune_jax.models.decoder import DecoderCache
from imgtune_jax.models.image_text import ImageText, unit_norm
from imgtune_jax.models.parts import COMPONENTS, param_paths
from imgtune_jax.models.pooling import TowerOutput
from imgtune_jax.models.stack import TAIL

Model = ImageText  # what the other rooms call it

__all__ = [
    "COMPONENTS",
    "DECODERS",
    "HEADS",
    "POOLERS",
    "TAIL",
    "TOWERS",
    "DecoderCache",
    "ImageText",
    "Model",
    "ModelFields",
    "TowerOutput",
    "abstract_tower",
    "build",
    "build_tower",
    "param_paths",
    "unit_norm",
]
