"""Towers, heads, a decoder, and the models composed of them. Only this package uses flax.linen."""

from imgtune_jax.models.build import (
    DECODERS,
    HEADS,
    POOLERS,
    TOWERS,
    TOWERS_VERSION,
    ModelConfig,
    abstract_tower_params,
    build_model,
    build_tower,
)
from imgtune_jax.models.components import COMPONENTS
from imgtune_jax.models.decoder import DecoderCache
from imgtune_jax.models.image_text import ImageTextModel, unit_norm
from imgtune_jax.models.pooling import TowerOutput

__all__ = [
    "COMPONENTS",
    "DECODERS",
    "HEADS",
    "POOLERS",
    "TOWERS",
    "TOWERS_VERSION",
    "DecoderCache",
    "ImageTextModel",
    "ModelConfig",
    "TowerOutput",
    "abstract_tower_params",
    "build_model",
    "build_tower",
    "unit_norm",
]
