"""Conversion of open_clip's model configs and `local-dir:` folders, in both directions.

The conversion includes activation, norm epsilon, pooling, mean and std. The weights need the same
values as in training: with others, the embeddings are wrong but look plausible.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from imgtune_jax import models
from imgtune_jax.errors import UserError
from imgtune_jax.interop import open_clip_coca, open_clip_map
from imgtune_jax.models.heads import IdentityHead, LinearHead
from imgtune_jax.models.text_transformer import TextTransformer
from imgtune_jax.models.vit import ViT
from imgtune_jax.paths import user_path
from imgtune_jax.types import Params

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
# OpenAI CLIP's mean and std of pixels in 0..1, open_clip's default.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Supported keys of vision_cfg and text_cfg.
VISION_KEYS = {
    *("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"),
    *("no_ln_pre", "pos_embed_type", "final_ln_after_pool", "pool_type", "output_tokens"),
    *("attentional_pool", "attn_pooler_queries", "attn_pooler_heads"),
    *("act_kwargs", "norm_kwargs"),
}
TEXT_KEYS = {
    *("context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"),
    *("width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id", "no_causal_mask", "pool_type"),
    *("proj_bias", "proj_type", "output_tokens", "act_kwargs", "norm_kwargs"),
    "embed_cls",
}
# open_clip's pool_type -> `pool` of this package's tower; "eot": end-of-text token.
IMAGE_POOLS = {"tok": "cls", "avg": "mean"}
TEXT_POOLS = {"argmax": "eot", "eos": "eot", "last": "last", "first": "first"}


def config_from_open_clip(
    cfg: Mapping[str, Any], preprocess: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Convert an open_clip model config and preprocess_cfg to a config for `build_model`.

    Raises UserError listing the features that this package does not support.
    """
    vision, text = dict(cfg["vision_cfg"]), dict(cfg["text_cfg"])
    if "multimodal_cfg" not in cfg and (vision.get("attentional_pool") or text.get("embed_cls")):
        raise UserError(
            "open_clip config: attentional_pool or embed_cls without multimodal_cfg is not "
            "supported; expected a CLIP or a CoCa"
        )
    _check_supported("vision_cfg", vision, VISION_KEYS)
    _check_supported("text_cfg", text, TEXT_KEYS)
    preprocess = preprocess or {}
    quick_gelu = bool(cfg.get("quick_gelu", False))
    return dict(
        embed_dim=cfg["embed_dim"],
        image_size=vision.get("image_size", 224),
        image_mean=tuple(255 * x for x in preprocess.get("mean", MEAN)),
        image_std=tuple(255 * x for x in preprocess.get("std", STD)),
        logit_scale_init=cfg.get("init_logit_scale", math.log(1 / 0.07)),
        logit_bias_init=cfg.get("init_logit_bias"),
        image=_image_fields(vision, quick_gelu),
        text=_text_fields(text, quick_gelu),
        image_head=dict(name="linear"),
        text_head=_text_head(text),
        **open_clip_coca.coca_fields_from(cfg, _epsilon(vision)),
    )


def _image_fields(vision: Mapping[str, Any], quick_gelu: bool) -> dict[str, Any]:
    width = vision.get("width", 768)
    pool = vision.get("pool_type", "tok")
    if pool not in IMAGE_POOLS or not isinstance(vision.get("image_size", 224), int):
        raise UserError(
            f"open_clip vision_cfg: pool_type = {pool!r}, image_size = {vision.get('image_size')}; "
            "expected pool_type 'tok' or 'avg', and an int (a square image)"
        )
    return dict(
        name="vit",
        width=width,
        depth=vision.get("layers", 12),
        mlp_dim=int(width * vision.get("mlp_ratio", 4.0)),
        num_heads=width // vision.get("head_width", 64),
        patch_size=vision.get("patch_size", 16),
        pool=IMAGE_POOLS[pool],
        final_norm=_final_norm(vision),
        pre_norm=not vision.get("no_ln_pre", False),
        patch_bias=False,
        patch_dropout=vision.get("patch_dropout", 0.0),
        act=_act(vision, quick_gelu),
        norm_epsilon=_epsilon(vision),
    )


def _final_norm(vision: Mapping[str, Any]) -> str:
    if vision.get("attentional_pool") is True:
        return "none"  # the norm comes after the pooler
    after_pool = vision.get("final_ln_after_pool") and not vision.get("attentional_pool")
    return "after_pool" if after_pool else "before_pool"


def _text_fields(text: Mapping[str, Any], quick_gelu: bool) -> dict[str, Any]:
    width = text.get("width", 512)
    pool = text.get("pool_type", "argmax")
    has_class_token = bool(text.get("embed_cls"))
    if pool not in TEXT_POOLS:
        raise UserError(
            f"open_clip text_cfg: pool_type = {pool!r}; expected one of {list(TEXT_POOLS)}"
        )
    return dict(
        name="text_transformer",
        width=width,
        depth=text.get("layers", 12),
        mlp_dim=int(width * text.get("mlp_ratio", 4.0)),
        num_heads=text.get("heads", 8),
        vocab_size=text.get("vocab_size", 49408),
        max_length=text.get("context_length", 77),
        causal=not text.get("no_causal_mask", False),
        mask_padding=has_class_token,  # without a class token, open_clip has no padding mask
        pool="class" if has_class_token else TEXT_POOLS[pool],
        shifted_class_mask=has_class_token,  # no open_clip config sets the corrected mask
        act=_act(text, quick_gelu),
        norm_epsilon=_epsilon(text),
    )


def _text_head(text: Mapping[str, Any]) -> dict[str, Any]:
    if text.get("proj_type", "linear") == "none":
        return dict(name="identity")
    return dict(name="linear", use_bias=bool(text.get("proj_bias", False)))


def _check_supported(group: str, cfg: Mapping[str, Any], known: set[str]) -> None:
    # An unknown key with a false value is a feature that is switched off.
    unsupported = [f"{k}={v!r}" for k, v in cfg.items() if k not in known and v]
    if isinstance(cfg.get("layers"), (list, tuple)):
        unsupported.append(f"layers={cfg['layers']} (a ModifiedResNet)")
    if unsupported:
        raise UserError(
            f"open_clip {group}: {', '.join(unsupported)} not supported; expected these keys only: "
            f"{', '.join(sorted(known))}"
        )


def _act(cfg: Mapping[str, Any], quick_gelu: bool) -> str:
    if quick_gelu:
        return "quick_gelu"
    kwargs = cfg.get("act_kwargs") or {}
    return "gelu_tanh" if kwargs.get("approximate") == "tanh" else "gelu"


def _epsilon(cfg: Mapping[str, Any]) -> float:
    return (cfg.get("norm_kwargs") or {}).get("eps", open_clip_coca.LAYER_NORM_EPSILON)


def config_to_open_clip(model: models.ImageTextModel) -> dict[str, Any]:
    """Return the open_clip model config with which the exported weights have the same outputs.

    Raises UserError for a model that open_clip cannot express.
    """
    image, text = model.image, model.text
    open_clip_map.open_clip_rules(model)  # raises UserError for weights that open_clip lacks
    assert isinstance(image, ViT) and isinstance(text, TextTransformer)
    _check_expressible(model, image, text)
    cfg: dict[str, Any] = dict(
        embed_dim=model.embed_dim,
        quick_gelu=image.act == "quick_gelu",
        vision_cfg=dict(
            **_transformer_fields(image),
            head_width=image.width // image.num_heads,
            patch_size=image.patch_size,
            image_size=image.image_size,
            pool_type="tok" if image.pool == "cls" else "avg",
            no_ln_pre=not image.pre_norm,
            final_ln_after_pool=image.final_norm == "after_pool",
        ),
        text_cfg=dict(
            **_transformer_fields(text),
            **_projection(model),
            heads=text.num_heads,
            vocab_size=text.vocab_size,
            context_length=text.max_length,
            no_causal_mask=not text.causal,
            pool_type={"eot": "argmax", "class": "argmax"}.get(text.pool, text.pool),
        ),
    )
    for group, fields in open_clip_coca.coca_fields_to(model).items():
        cfg[group] = cfg.get(group, {}) | fields
    if model.logit_bias_init is not None:
        cfg["init_logit_bias"] = model.logit_bias_init
    return cfg


def _check_expressible(model: models.ImageTextModel, image: ViT, text: TextTransformer) -> None:
    errors = []
    if (image.act == "quick_gelu") != (text.act == "quick_gelu"):
        errors.append("quick_gelu in one tower only")
    if text.mask_padding and not text.causal:
        errors.append("a bidirectional text tower with a padding mask")
    layout = getattr(model.image_pooler, "layout", None)
    if (image.final_norm == "none") != (layout == "shared"):
        errors.append(f"final_norm={image.final_norm!r} with image_pooler.layout={layout!r}")
    if errors:
        raise UserError(f"open_clip cannot express: {'; '.join(errors)}")


def _projection(model: models.ImageTextModel) -> dict[str, Any]:
    if isinstance(model.text_head, IdentityHead):
        return dict(proj_type="none")
    assert isinstance(model.text_head, LinearHead)
    return dict(proj_bias=model.text_head.use_bias)


def _transformer_fields(tower: ViT | TextTransformer) -> dict[str, Any]:
    act = dict(act_kwargs={"approximate": "tanh"}) if tower.act == "gelu_tanh" else {}
    if tower.act not in ("gelu", "gelu_tanh", "quick_gelu"):
        raise UserError(
            f"act = {tower.act!r}; open_clip can express gelu, gelu_tanh and quick_gelu"
        )
    return dict(
        layers=tower.depth,
        width=tower.width,
        mlp_ratio=tower.mlp_dim / tower.width,
        norm_kwargs={"eps": tower.norm_epsilon},
        **act,
    )


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
    config = dict(model_cfg=config_to_open_clip(model), preprocess_cfg=preprocess)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2))
    save_file(open_clip_map.save_open_clip(params, model), folder / WEIGHTS_FILE)


def load_open_clip_folder(path: str | Path) -> tuple[dict[str, Any], Params]:
    """Read an open_clip folder; return (config for `build_model`, parameters).

    Raises UserError if a file is missing or the model is not supported.
    """
    folder = user_path(path)
    missing = [n for n in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / n).is_file()]
    if missing:
        raise UserError(
            f"{folder} is not an open_clip folder: {', '.join(missing)} missing; expected "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    cfg = config_from_open_clip(config["model_cfg"], config.get("preprocess_cfg"))
    return cfg, open_clip_map.load_open_clip(
        load_file(folder / WEIGHTS_FILE), models.build_model(cfg)
    )
