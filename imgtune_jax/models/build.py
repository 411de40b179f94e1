"""Build modules from a mapping of fields. An unknown name is an error that lists the valid ones."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from imgtune_jax.errors import UserError
from imgtune_jax.models import heads, initializers
from imgtune_jax.models.bert import Bert
from imgtune_jax.models.decoder import Decoder
from imgtune_jax.models.efficientnet import EfficientNetLite
from imgtune_jax.models.image_text import ImageTextModel
from imgtune_jax.models.pooling import AttentionalPooler
from imgtune_jax.models.resnet import ResNet
from imgtune_jax.models.text_transformer import TextTransformer
from imgtune_jax.models.vit import ViT
from imgtune_jax.types import Params, no_constraint

TOWERS: dict[str, Callable[..., nn.Module]] = {
    "vit": ViT,
    "efficientnet_lite": EfficientNetLite,
    "resnet": ResNet,
    "text_transformer": TextTransformer,
    "bert": Bert,
}
HEADS: dict[str, Callable[..., nn.Module]] = {
    "identity": heads.IdentityHead,
    "linear": heads.LinearHead,
    "mlp": heads.MlpHead,
}
DECODERS: dict[str, Callable[..., nn.Module]] = {"transformer": Decoder}
POOLERS: dict[str, Callable[..., nn.Module]] = {"attentional": AttentionalPooler}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
NON_CONFIG_FIELDS = ("parent", "name", "constrain")

LOG_100 = math.log(100.0)

# Version of the outputs of all towers, given their parameters. It is part of the key of cached
# features. Increase it with each change of the code after which a tower returns other numbers.
# `tests/models/test_towers_golden.py` fails if that is forgotten. A digest of the source files
# would need no care, but each edited comment would discard all caches.
TOWERS_VERSION = 1


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The keys of a model's mapping and their defaults.

    `image` and `text` are {"name": key of TOWERS, "variant": …, field: value …}. The other
    components have the same form. Their names are keys of HEADS, DECODERS and POOLERS. A model
    without `text` has no heads and no logit scale; one without `decoder` generates no captions.

    `dtype` ("float32" or "bfloat16") is the type of matrix-product operands; a component's mapping
    can override it. `image_mean` and `image_std` are in units of 0..255. `logit_scale_init` and
    `logit_scale_max` are natural logs; with `logit_scale_max` None, the scale is not clamped.
    `logit_bias_init` None means that there is no bias; SigLIP has -10.
    """

    image: Mapping[str, Any]
    text: Mapping[str, Any] | None = None
    decoder: Mapping[str, Any] | None = None
    image_pooler: Mapping[str, Any] | None = None
    embed_dim: int | None = None
    image_head: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "linear"})
    text_head: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "linear"})
    image_size: int = 224
    image_mean: tuple[float, ...] = (127.5, 127.5, 127.5)
    image_std: tuple[float, ...] = (127.5, 127.5, 127.5)
    dtype: str = "float32"
    logit_scale_init: float = math.log(1 / 0.07)
    logit_scale_max: float | None = LOG_100
    logit_bias_init: float | None = None


def build_model(cfg: Mapping[str, Any], partitioner: Any = None) -> ImageTextModel:
    """Build the model that a mapping with the keys of ModelConfig describes.

    The `partitioner`, if given, determines the layout of every residual stream (`constrain`).
    Raises a UserError that names the component, the invalid field and the valid ones.
    """
    fields = _parse_model_config(cfg)
    constrain = no_constraint if partitioner is None else partitioner.constrain
    common = dict(dtype=fields.dtype, constrain=constrain)
    head_defaults = dict(dtype=fields.dtype, embed_dim=fields.embed_dim)

    def head(role: str) -> nn.Module | None:
        if not fields.text:
            return None
        return _build_component(role, HEADS, getattr(fields, role), head_defaults)

    def optional(role: str, table: Mapping[str, Any]) -> nn.Module | None:
        component = getattr(fields, role)
        return _build_component(role, table, component, common) if component else None

    model = ImageTextModel(
        image=build_tower(fields.image, image_size=fields.image_size, **common),
        text=build_tower(fields.text, **common) if fields.text else None,
        image_head=head("image_head"),
        text_head=head("text_head"),
        decoder=optional("decoder", DECODERS),
        image_pooler=optional("image_pooler", POOLERS),
        embed_dim=fields.embed_dim if fields.text else None,
        image_size=fields.image_size,
        image_mean=tuple(fields.image_mean),
        image_std=tuple(fields.image_std),
        logit_scale_init=fields.logit_scale_init,
        logit_scale_max=fields.logit_scale_max,
        logit_bias_init=fields.logit_bias_init,
        constrain=constrain,
    )
    _check_decoder_input(model)
    return model


def _parse_model_config(cfg: Mapping[str, Any]) -> ModelConfig:
    values = _lists_to_tuples(cfg)
    _check_fields("model", values, [f.name for f in dataclasses.fields(ModelConfig)])
    if "image" not in values:
        raise UserError("the model has no image tower; set `image`, which has no default")
    fields = ModelConfig(**values)
    if not fields.text and not fields.decoder:
        raise UserError(
            "the model has neither text nor decoder; add `text` for contrastive training, "
            "`decoder` for captioning, or both"
        )
    if fields.text and fields.embed_dim is None:
        raise UserError(
            "the model has no embed_dim; set it to the width of the embedding space that image "
            "and text share"
        )
    return fields


def _check_decoder_input(model: ImageTextModel) -> None:
    """Raise UserError for a decoder that could read future tokens through the text tower."""
    if model.decoder is None or model.decoder.input_from == "ids":
        return
    if not getattr(model.text, "causal", False):
        raise UserError(
            "a decoder with input_from='text_tower' needs a causal text tower (text_transformer "
            "with causal=True), or it would read the tokens that it predicts; got "
            f"{type(model.text).__name__}"
        )


def build_tower(cfg: Mapping[str, Any], **defaults: Any) -> nn.Module:
    """Build a tower from {"name": …, "variant": …, field: value …}.

    `defaults` apply to fields that the tower has and the mapping omits. Raises the UserErrors of
    `build_model`.
    """
    return _build_component("tower", TOWERS, cfg, defaults)


def _build_component(
    role: str, table: Mapping[str, Any], cfg: Mapping[str, Any], defaults: Mapping[str, Any]
) -> nn.Module:
    values = _lists_to_tuples(cfg)
    name = values.pop("name", None)
    if name not in table:
        raise UserError(f"{role}: name = {name!r}; expected one of {', '.join(table)}")
    cls = table[name]
    fields = [f.name for f in dataclasses.fields(cls) if f.name not in NON_CONFIG_FIELDS]
    variants = ["variant"] if hasattr(cls, "variant_fields") else []
    _check_fields(f"{role} {name!r}", values, [*variants, *fields])
    variant = values.pop("variant", None)
    sizes = {} if variant is None else cls.variant_fields(str(variant))
    all_fields = {f.name for f in dataclasses.fields(cls)}
    defaults = {k: v for k, v in defaults.items() if k in all_fields}
    size = defaults.get("image_size")
    if size is not None and values.get("image_size", size) != size:
        raise UserError(
            f"{role} {name!r}: image_size={values['image_size']}, but the model's is {size}; "
            "remove image_size from the tower"
        )
    merged = {**defaults, **sizes, **values}
    if "dtype" in merged:
        merged["dtype"] = _dtype(role, merged["dtype"])
    return cls(**merged)


def _dtype(role: str, name: Any) -> Any:
    if name not in DTYPES:
        raise UserError(f"{role}: dtype = {name!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _check_fields(component: str, names: Iterable[str], valid: list[str]) -> None:
    for field in names:
        if field not in valid:
            close = difflib.get_close_matches(field, valid, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(
                f"{component} has no field {field!r}; {hint}valid fields: {', '.join(valid)}"
            )


def _lists_to_tuples(cfg: Any) -> dict[str, Any]:
    """Return a dict with tuples instead of lists, so that modules are hashable."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in dict(cfg).items()}


def abstract_tower_params(tower: nn.Module) -> Params:
    """Return the shapes and types of a tower's parameters, without computing anything."""
    if hasattr(tower, "max_length"):
        shape = (1, tower.max_length)
        inputs = (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_))
    else:
        size = getattr(
            tower, "image_size", 32
        )  # only a ViT has one; the parameters of CNNs fit any size
        inputs = (jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),)
    return initializers.abstract_params(initializers.param_specs(tower, *inputs))
