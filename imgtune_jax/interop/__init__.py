"""Weights from and to other codebases. NumPy in, NumPy parameter trees out."""

from imgtune_jax.interop.files import load_params, read_state, save_params
from imgtune_jax.interop.loaders import LOADERS, load_tower
from imgtune_jax.interop.open_clip_config import (
    from_open_clip,
    load_folder,
    save_folder,
    to_open_clip,
)
from imgtune_jax.interop.open_clip_map import load as load_open_clip
from imgtune_jax.interop.open_clip_map import save as save_open_clip

__all__ = [
    "LOADERS",
    "from_open_clip",
    "load_folder",
    "load_open_clip",
    "load_params",
    "load_tower",
    "read_state",
    "save_folder",
    "save_open_clip",
    "save_params",
    "to_open_clip",
]
