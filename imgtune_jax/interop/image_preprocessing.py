"""Image preprocessing in other codebases' files: size, mean, std, resize mode and interpolation.

Mean and std are in units of 0..255, as in a model's config. `preprocess.mode` and
`preprocess.interpolation` are fields of the `resize` transform in the config's `preprocess`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from imgtune_jax import data
from imgtune_jax.data.transforms import Resize
from imgtune_jax.errors import UserError
from imgtune_jax.interop.stated_fields import StatedFields
from imgtune_jax.interop.weight_files import read_json

PROCESSOR_FILE = "preprocessor_config.json"  # of Transformers
PILLOW_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def configured_fields(
    *,
    image_size: int | None,
    image_mean: Iterable[float] | None,
    image_std: Iterable[float] | None,
    preprocess: Iterable[Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """Return the fields of an image tower's input in a config, without those that are None."""
    fields = {
        "image_size": image_size,
        "image_mean": None if image_mean is None else tuple(image_mean),
        "image_std": None if image_std is None else tuple(image_std),
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    if preprocess is None:
        return fields
    transforms = data.build_transform(preprocess).transforms
    resize = next((t for t in transforms if isinstance(t, Resize)), None)
    # Without a resize, mode and interpolation are None, and therefore differ from every file's.
    fields["preprocess.mode"] = getattr(resize, "mode", None)
    fields["preprocess.interpolation"] = getattr(resize, "interpolation", None)
    return fields


def open_clip_fields(preprocess_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that an open_clip preprocess_cfg states."""
    fields: dict[str, Any] = {
        f"image_{name}": tuple(255 * x for x in preprocess_cfg[name])
        for name in ("mean", "std")
        if name in preprocess_cfg
    }
    if "size" in preprocess_cfg:
        fields["image_size"] = _side(preprocess_cfg["size"])
    if "resize_mode" in preprocess_cfg:
        fields["preprocess.mode"] = preprocess_cfg["resize_mode"]
    if "interpolation" in preprocess_cfg:
        fields["preprocess.interpolation"] = _open_clip_filter(preprocess_cfg["interpolation"])
    return fields


def open_clip_transforms(
    preprocess_cfg: Mapping[str, Any], *, image_size: int
) -> tuple[dict[str, Any], ...]:
    """Return the value of the config's `preprocess` that does what open_clip does in inference.

    `image_size` is the size if preprocess_cfg has none. Raises UserError for an unknown resize mode
    and for images that are not square.
    """
    size = _side(preprocess_cfg.get("size", image_size))
    mode = preprocess_cfg.get("resize_mode", "shortest")
    if mode not in ("shortest", "longest", "squash") or not isinstance(size, int):
        raise UserError(
            f"open_clip preprocess_cfg: resize_mode = {mode!r}, size = {size}; expected shortest, "
            "longest or squash, and a square"
        )
    interpolation = _open_clip_filter(preprocess_cfg.get("interpolation", "bicubic"))
    resize: dict[str, Any] = dict(name="resize", size=size, mode=mode, interpolation=interpolation)
    if mode == "shortest":
        return resize, dict(name="center_crop", size=size)
    if mode == "longest":
        fill = preprocess_cfg.get("fill_color", 0)
        resize["fill"] = (fill,) * 3 if isinstance(fill, int) else tuple(fill)
    return (resize,)


def _open_clip_filter(name: str) -> str:
    """Return the filter in inference: "random", for training, means bicubic there."""
    return "bicubic" if name == "random" else name


def _side(size: Any) -> Any:
    """Return the side of a square, given as one number or as height and width."""
    sides = [size[k] for k in ("height", "width")] if isinstance(size, Mapping) else size
    if isinstance(sides, list | tuple):
        return sides[0] if len(set(sides)) == 1 else tuple(sides)
    return sides


def processor_fields(folder: Path) -> StatedFields:
    """Return the fields in a folder's preprocessor_config.json, if it has that file."""
    path = folder / PROCESSOR_FILE
    if not path.is_file():
        return {}
    processor = read_json(path)
    fields: dict[str, Any] = {}
    if processor.get("do_normalize", True):
        for name in ("image_mean", "image_std"):
            if name in processor:
                fields[name] = tuple(255 * x for x in processor[name])
    if processor.get("resample") in PILLOW_FILTERS:
        fields["preprocess.interpolation"] = PILLOW_FILTERS[processor["resample"]]
    size = processor.get("size")
    if isinstance(size, Mapping) and "shortest_edge" in size:
        fields["preprocess.mode"], size = "shortest", size["shortest_edge"]
    elif isinstance(size, Mapping) and {"height", "width"} <= size.keys():
        fields["preprocess.mode"] = "squash"
    if processor.get("do_center_crop") and "crop_size" in processor:
        size = processor["crop_size"]
    if size is not None:
        fields["image_size"] = _side(size)
    return {PROCESSOR_FILE: fields}
