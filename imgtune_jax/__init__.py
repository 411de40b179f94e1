"""Locked-image tuning and related methods in JAX.

The public names below are imported on first use. Importing the package alone does not import JAX,
so that data workers start quickly.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imgtune_jax.api import TunedModel, load, train
    from imgtune_jax.interop import (
        config_from_open_clip,
        config_to_open_clip,
        load_bert,
        load_efficientnet_lite,
        load_open_clip,
        load_open_clip_folder,
        load_open_clip_tower,
        load_params,
        load_resnet,
        load_tower,
        read_state_dict,
        save_open_clip,
        save_open_clip_folder,
        save_params,
    )
    from imgtune_jax.models import (
        ImageTextModel,
        abstract_tower_params,
        build_model,
        build_tower,
    )
    from imgtune_jax.models.bert import Bert
    from imgtune_jax.models.efficientnet import EfficientNetLite
    from imgtune_jax.models.resnet import ResNet
    from imgtune_jax.models.text_transformer import TextTransformer
    from imgtune_jax.models.vit import ViT
    from imgtune_jax.objectives import (
        CaptionLoss,
        SigmoidLoss,
        SoftmaxLoss,
        sigmoid_loss,
        softmax_loss,
    )

__version__ = "0.1.0"
__all__ = [
    "Bert",
    "CaptionLoss",
    "EfficientNetLite",
    "ImageTextModel",
    "ResNet",
    "SigmoidLoss",
    "SoftmaxLoss",
    "TextTransformer",
    "TunedModel",
    "ViT",
    "abstract_tower_params",
    "build_model",
    "build_tower",
    "config_from_open_clip",
    "config_to_open_clip",
    "load",
    "load_bert",
    "load_efficientnet_lite",
    "load_open_clip",
    "load_open_clip_folder",
    "load_open_clip_tower",
    "load_params",
    "load_resnet",
    "load_tower",
    "read_state_dict",
    "save_open_clip",
    "save_open_clip_folder",
    "save_params",
    "sigmoid_loss",
    "softmax_loss",
    "train",
]

# Public names that are not in `imgtune_jax.interop`, with their modules.
_MODULES = {
    "Bert": "imgtune_jax.models.bert",
    "CaptionLoss": "imgtune_jax.objectives",
    "EfficientNetLite": "imgtune_jax.models.efficientnet",
    "ImageTextModel": "imgtune_jax.models",
    "ResNet": "imgtune_jax.models.resnet",
    "SigmoidLoss": "imgtune_jax.objectives",
    "SoftmaxLoss": "imgtune_jax.objectives",
    "TextTransformer": "imgtune_jax.models.text_transformer",
    "TunedModel": "imgtune_jax.api",
    "ViT": "imgtune_jax.models.vit",
    "abstract_tower_params": "imgtune_jax.models",
    "build_model": "imgtune_jax.models",
    "build_tower": "imgtune_jax.models",
    "load": "imgtune_jax.api",
    "sigmoid_loss": "imgtune_jax.objectives",
    "softmax_loss": "imgtune_jax.objectives",
    "train": "imgtune_jax.api",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'imgtune_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES.get(name, "imgtune_jax.interop")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
