"""Weights from and to other codebases. NumPy in, NumPy parameter trees out."""

from imgtune_jax.interop.loaders import LOADERS, load_tower
from imgtune_jax.interop.open_clip_config import (
    config_from_open_clip,
    config_to_open_clip,
    load_open_clip_folder,
    save_open_clip_folder,
)
from imgtune_jax.interop.open_clip_map import load_open_clip as load_open_clip
from imgtune_jax.interop.open_clip_map import save_open_clip as save_open_clip
from imgtune_jax.interop.weight_files import load_params, read_state_dict, save_params

__all__ = [
    "LOADERS",
    "config_from_open_clip",
    "config_to_open_clip",
    "load_open_clip",
    "load_open_clip_folder",
    "load_params",
    "load_tower",
    "read_state_dict",
    "save_open_clip",
    "save_open_clip_folder",
    "save_params",
]
