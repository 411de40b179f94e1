"""Loading of pretrained towers from a config, `{"format": …, "package" or "path": …}`.

Files beside the weights that state how they were trained are compared with the config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imgtune_jax import models
from imgtune_jax.config import load_config
from imgtune_jax.errors import UserError
from imgtune_jax.interop import (
    efficientnet_lite,
    huggingface,
    image_preprocessing,
    open_clip_folder,
    open_clip_map,
    torchvision,
    weight_files,
)
from imgtune_jax.interop.stated_fields import StatedFields, check_stated_fields, tower_fields
from imgtune_jax.interop.weight_map import copy_rule, to_params
from imgtune_jax.models.bert import Bert
from imgtune_jax.models.efficientnet import EfficientNetLite
from imgtune_jax.models.resnet import ResNet
from imgtune_jax.models.text_transformer import TextTransformer
from imgtune_jax.models.vit import ViT
from imgtune_jax.package_files import package_file
from imgtune_jax.param_tree import flatten
from imgtune_jax.types import Params

SETTINGS = {"format", "path", "package", "pattern", "ignore"}
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class WeightFormat:
    """A format of weight files.

    `load(state dict, tower, abstract parameters, folder)` returns the parameters; the folder is
    that of the weight file. `pattern` is the glob of the weight file in a pip package.
    `stated_fields(folder, modality)` returns what the files in the folder state, and `fixed_fields`
    are values of fields that a config of this format implies.
    """

    load: Callable[[Mapping[str, Any], Any, Params, Path], Params]
    towers: tuple[type, ...]
    pattern: str
    stated_fields: Callable[[Path, str], StatedFields]
    fixed_fields: Mapping[str, Any] = field(default_factory=dict)


def _without_folder(load: Callable[..., Params]) -> Callable[..., Params]:
    return lambda state, tower, expected, folder: load(state, tower, expected)


def _load_bert(state: Mapping[str, Any], tower: Bert, expected: Params, folder: Path) -> Params:
    path = folder / huggingface.CONFIG_FILE
    config = weight_files.read_json(path) if path.is_file() else None
    return huggingface.load_bert(state, tower, expected, config=config)


def _load_saved_params(
    state: Mapping[str, Any], tower: Any, expected: Params, folder: Path
) -> Params:
    """Return a tower's parameters from a `save_params` file of the tower or of a full model."""
    del folder
    modality = _modality(tower)
    prefix = f"{modality}/"
    tower_state = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
    rules = [copy_rule(path, path) for path in flatten(expected)]
    return to_params(tower_state or state, rules, expected, what=f"the {modality} tower")


def _saved_fields(folder: Path, modality: str) -> StatedFields:
    """Return the fields in the config.json that `TunedModel.save` wrote beside the weights."""
    path = folder / CONFIG_FILE
    if not path.is_file() or not {"model", "preprocess"} <= weight_files.read_json(path).keys():
        return {}
    config = load_config(path)
    model_cfg = config.model
    if not model_cfg.get(modality):
        return {}
    image_size = model_cfg.get("image_size", models.ModelConfig.image_size)
    fields = tower_fields(models.build_tower(model_cfg[modality], image_size=image_size))
    if modality == "image":
        fields |= image_preprocessing.configured_fields(
            image_size=image_size,
            image_mean=model_cfg.get("image_mean"),
            image_std=model_cfg.get("image_std"),
            preprocess=config.preprocess,
        )
    return {CONFIG_FILE: fields}


def _modality(tower: Any) -> str:
    return "text" if hasattr(tower, "max_length") else "image"


def _processor_fields(folder: Path, modality: str) -> StatedFields:
    del modality  # an image tower
    return image_preprocessing.processor_fields(folder)


LOADERS: dict[str, WeightFormat] = {
    "efficientnet_lite": WeightFormat(
        _without_folder(efficientnet_lite.load_efficientnet_lite),
        (EfficientNetLite,),
        "*.pth",
        _processor_fields,
    ),
    "resnet": WeightFormat(
        _without_folder(torchvision.load_resnet), (ResNet,), "*.pth", _processor_fields
    ),
    "bert": WeightFormat(
        _load_bert,
        (Bert,),
        "*.safetensors",
        huggingface.stated_fields,
        huggingface.FIXED_FIELDS,
    ),
    "open_clip": WeightFormat(
        _without_folder(open_clip_map.load_open_clip_tower),
        (ViT, TextTransformer),
        "*.safetensors",
        open_clip_folder.stated_fields,
    ),
    "params": WeightFormat(
        _load_saved_params,
        (ViT, EfficientNetLite, ResNet, TextTransformer, Bert),
        "*.safetensors",
        _saved_fields,
    ),
}


def load_tower(
    init: Mapping[str, Any],
    module_cfg: Mapping[str, Any],
    *,
    image_size: int | None = None,
    image_mean: Iterable[float] | None = None,
    image_std: Iterable[float] | None = None,
    preprocess: Iterable[Mapping[str, Any]] | None = None,
) -> Params:
    """Return a tower's pretrained parameters as NumPy float32 arrays.

    `init` has "format", a key of LOADERS, and either "path", a weight file or a folder with one, or
    "package", a pip package. If the package has several weight files, "pattern" is the glob of the
    one to load. `module_cfg` is the tower's config for `models.build_tower`. `image_size` is the
    image size of a ViT whose config has none.

    Files beside the weights, such as config.json, are compared with `module_cfg` and, for an image
    tower, with those of the other arguments that are given: they are values of the config's `model`
    and `preprocess`. "ignore" in `init` lists the fields that are to differ.

    Raises UserError listing all fields that differ; listing every missing, unexpected and misshaped
    key; naming parameters that are not finite; or naming the package to install.
    """
    weight_format = _weight_format(init)
    tower = models.build_tower(module_cfg, **({"image_size": image_size} if image_size else {}))
    _check_fits(weight_format, tower, init["format"])
    if "path" in init:
        path = weight_files.find_weight_file(init["path"])
    else:
        path = package_file(init["package"], init.get("pattern", weight_format.pattern))
    image_fields = image_preprocessing.configured_fields(
        image_size=image_size, image_mean=image_mean, image_std=image_std, preprocess=preprocess
    )
    modality = _modality(tower)
    check_stated_fields(
        weight_format.stated_fields(path.parent, modality),
        {
            **tower_fields(tower),
            **weight_format.fixed_fields,
            **(image_fields if modality == "image" else {}),
        },
        ignore=init.get("ignore", ()),
        path=path,
    )
    state = weight_files.read_state_dict(path)
    return weight_format.load(state, tower, models.abstract_tower_params(tower), path.parent)


def _weight_format(init: Mapping[str, Any]) -> WeightFormat:
    """Return the format that `init` names. Raises UserError for invalid settings in `init`."""
    if init.get("format") not in LOADERS:
        raise UserError(
            f"weights: format = {init.get('format')!r}; expected one of {', '.join(LOADERS)}"
        )
    if init.keys() - SETTINGS or ("path" in init) == ("package" in init):
        raise UserError(
            f"weights: got {', '.join(sorted(init))}; expected format and one of path or package "
            "(with a pattern, if the package has several weight files), and optionally ignore"
        )
    return LOADERS[init["format"]]


def _check_fits(weight_format: WeightFormat, tower: Any, name: str) -> None:
    """Raise UserError if a format has no weights of such a tower."""
    if not isinstance(tower, weight_format.towers):
        names = ", ".join(cls.__name__ for cls in weight_format.towers)
        raise UserError(
            f"weights: format = {name!r} fits {names}, not {type(tower).__name__}; change the "
            "format or the tower"
        )
