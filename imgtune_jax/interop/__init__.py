"""Conversion of weights and configs from and to other codebases, in NumPy."""

from imgtune_jax.interop.efficientnet_lite import load_efficientnet_lite
from imgtune_jax.interop.huggingface import load_bert
from imgtune_jax.interop.loaders import LOADERS, load_tower
from imgtune_jax.interop.open_clip_config import config_from_open_clip, config_to_open_clip
from imgtune_jax.interop.open_clip_folder import (
    load_open_clip_folder,
    save_open_clip_folder,
)
from imgtune_jax.interop.open_clip_map import (
    load_open_clip,
    load_open_clip_tower,
    save_open_clip,
)
from imgtune_jax.interop.torchvision import load_resnet
from imgtune_jax.interop.weight_files import load_params, read_state_dict, save_params

__all__ = [
    "LOADERS",
    "config_from_open_clip",
    "config_to_open_clip",
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
]
