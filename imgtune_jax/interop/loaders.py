"""From `{"format": …, "package" or "path": …}` to a tower's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from imgtune_jax import models
from imgtune_jax.interop import (
    efficientnet_lite,
    huggingface,
    open_clip_map,
    torchvision,
    weight_files,
)
from imgtune_jax.interop.weight_map import copy_rule, flatten, to_params
from imgtune_jax.models.bert import Bert
from imgtune_jax.models.efficientnet import EfficientNetLite
from imgtune_jax.models.resnet import ResNet
from imgtune_jax.models.text_transformer import TextTransformer
from imgtune_jax.models.vit import ViT
from imgtune_jax.package_files import package_file
from imgtune_jax.types import Params


def _load_own_params(state: Mapping[str, Any], tower: Any, expected: Params) -> Params:
    """Our own files: a tower alone, or the tower of a whole model."""
    role = "text" if hasattr(tower, "max_length") else "image"
    inside = {n.removeprefix(f"{role}/"): x for n, x in state.items() if n.startswith(f"{role}/")}
    rules = [copy_rule(path, path) for path in flatten(expected)]
    return to_params(inside or state, rules, expected, what=f"the {role} tower")


Loader = Callable[[Mapping[str, Any], Any, Params], Params]

# format -> (loader, towers it fits, glob of its file inside a package)
LOADERS: dict[str, tuple[Loader, tuple[type, ...], str]] = {
    "efficientnet_lite": (efficientnet_lite.load_efficientnet_lite, (EfficientNetLite,), "*.pth"),
    "resnet": (torchvision.load_resnet, (ResNet,), "*.pth"),
    "bert": (huggingface.load_bert, (Bert,), "*.safetensors"),
    "open_clip": (open_clip_map.load_open_clip_tower, (ViT, TextTransformer), "*.safetensors"),
    "params": (
        _load_own_params,
        (ViT, EfficientNetLite, ResNet, TextTransformer, Bert),
        "*.safetensors",
    ),
}


def load_tower(
    init: Mapping[str, Any], module_cfg: Mapping[str, Any], *, image_size: int | None = None
) -> Params:
    """A tower's parameters, NumPy float32, as `models.build` will want them.

    `init` is {"format": of LOADERS, "path": file} or {"format", "package": pip name, "pattern":
    glob of the file in it, if there are several}. `module_cfg` is the tower's mapping; a ViT whose
    mapping does not state `image_size` takes the one given here. Raises ValueError listing every
    missing, unexpected and misshaped key, or saying what to install.
    """
    form = init.get("format")
    if form not in LOADERS:
        raise ValueError(f"weights: format={form!r}; want one of {', '.join(LOADERS)}")
    loader, towers, pattern = LOADERS[form]
    unknown = init.keys() - {"format", "path", "package", "pattern"}
    if unknown or ("path" in init) == ("package" in init):
        raise ValueError(
            f"weights: got {', '.join(sorted(init))}; want format and one of path or package "
            "(with a pattern, if the package has several files)"
        )
    defaults = {} if image_size is None else {"image_size": image_size}
    tower = models.build_tower(module_cfg, **defaults)
    if not isinstance(tower, towers):
        fits = ", ".join(t.__name__ for t in towers)
        raise ValueError(f"weights: format {form!r} fits {fits}, not {type(tower).__name__}")
    if "path" in init:
        path = Path(init["path"])
    else:
        path = package_file(init["package"], init.get("pattern", pattern))
    return loader(weight_files.read_state_dict(path), tower, models.abstract_tower_params(tower))
