"""Folders that open_clip loads as `local-dir:PATH`: a config and a weight file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.numpy import save_file

from imgtune_jax import models
from imgtune_jax.errors import UserError
from imgtune_jax.interop import image_preprocessing, open_clip_config, open_clip_map
from imgtune_jax.interop.stated_fields import StatedFields, tower_fields
from imgtune_jax.interop.weight_files import read_json, read_state_dict
from imgtune_jax.paths import user_path
from imgtune_jax.types import Params

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
WEIGHTS_FILES = (WEIGHTS_FILE, "open_clip_pytorch_model.bin")  # in order of preference


class OpenClipFolder(NamedTuple):
    """Content of an open_clip folder.

    `model` is a config for `build_model`, and `preprocess` the transforms of open_clip's
    inference, for `config.preprocess`. The parameters need both.
    """

    model: dict[str, Any]
    params: Params
    preprocess: tuple[dict[str, Any], ...]


def save_open_clip_folder(
    path: str | Path,
    model: models.ImageTextModel,
    params: Params,
    *,
    interpolation: str = "bicubic",
    resize_mode: str = "shortest",
) -> None:
    """Write a model as a folder that open_clip loads as `local-dir:PATH`.

    `interpolation` and `resize_mode` are entries of open_clip's preprocess_cfg. Raises UserError
    for a model that open_clip cannot express.
    """
    preprocess = dict(
        size=[model.image_size, model.image_size],
        mean=[x / 255 for x in model.image_mean],
        std=[x / 255 for x in model.image_std],
        interpolation=interpolation,
        resize_mode=resize_mode,
    )
    folder = user_path(path)
    folder.mkdir(parents=True, exist_ok=True)
    model_cfg = open_clip_config.config_to_open_clip(model)
    config = dict(model_cfg=model_cfg, preprocess_cfg=preprocess)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2))
    save_file(open_clip_map.save_open_clip(params, model), folder / WEIGHTS_FILE)


def load_open_clip_folder(path: str | Path) -> OpenClipFolder:
    """Read an open_clip folder: model config, parameters and preprocessing.

    Raises UserError if a file is missing or the model is not supported.
    """
    folder = user_path(path)
    weights = [folder / name for name in WEIGHTS_FILES if (folder / name).is_file()]
    if not weights or not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{folder} is not an open_clip folder; expected {CONFIG_FILE} and one of "
            f"{', '.join(WEIGHTS_FILES)}"
        )
    model_cfg, preprocess_cfg = _read_config(folder)
    cfg = open_clip_config.config_from_open_clip(model_cfg, preprocess_cfg)
    params = open_clip_map.load_open_clip(read_state_dict(weights[0]), models.build_model(cfg))
    preprocess = image_preprocessing.open_clip_transforms(
        preprocess_cfg, image_size=cfg["image_size"]
    )
    return OpenClipFolder(cfg, params, preprocess)


def stated_fields(folder: Path, modality: str) -> StatedFields:
    """Return the fields of one tower, and of its images, in the files beside open_clip weights."""
    if not (folder / CONFIG_FILE).is_file():
        return image_preprocessing.processor_fields(folder)
    model_cfg, preprocess_cfg = _read_config(folder)
    fields = tower_fields(open_clip_config.tower_from_open_clip(model_cfg, modality))
    if modality == "image":
        fields |= image_preprocessing.open_clip_fields(preprocess_cfg)
    return {CONFIG_FILE: fields}


def _read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (model_cfg, preprocess_cfg) of a folder's open_clip_config.json."""
    config = read_json(folder / CONFIG_FILE)
    model_cfg = config.get("model_cfg")
    if not isinstance(model_cfg, dict) or not {"vision_cfg", "text_cfg"} <= model_cfg.keys():
        raise UserError(
            f"{folder / CONFIG_FILE} has no model_cfg with vision_cfg and text_cfg; expected the "
            "config that open_clip writes"
        )
    return model_cfg, config.get("preprocess_cfg") or {}
