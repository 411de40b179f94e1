"""open_clip's CoCa: what it has beyond CLIP, its names and its config, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from imgtune_jax.interop import weight_map
from imgtune_jax.models import Model
from imgtune_jax.models.decoder import Decoder
from imgtune_jax.models.pooling import AttentionalPooler

EPSILON = 1e-5
MLP_RATIO = 4  # of the decoder; open_clip does not pass on what its config says
MULTIMODAL_KEYS = {
    *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "dim_head"),
    *("n_queries", "attn_pooler_heads"),
}


def decoder_map(decoder: Decoder) -> list[weight_map.Rule]:
    """The rules of `text_decoder`. Raises ValueError for a decoder that open_clip lacks."""
    if decoder.cross != "block" or decoder.input_from != "text_tower" or decoder.context_norm:
        raise ValueError(
            "open_clip's decoder has cross='block', input_from='text_tower', context_norm=False; got "
            f"{decoder.cross!r}, {decoder.input_from!r}, {decoder.context_norm}"
        )
    found = []
    for i in range(decoder.depth):
        own, cross = f"text_decoder.resblocks.{i}", f"text_decoder.cross_attn.{i}"
        found += residual_block(own, f"blocks_{i}")
        found += residual_block(
            cross,
            f"blocks_{i}",
            names=("cross_norm", "cross", "cross_norm2", "cross_mlp"),
        )
        found += weight_map.norm_rules(f"{cross}.ln_1_kv", f"blocks_{i}/cross_context_norm")
    found += weight_map.norm_rules("text_decoder.ln_final", "final_norm")
    return [*found, weight_map.copy_rule("text_decoder.text_projection", "vocabulary/kernel")]


def residual_block(
    theirs: str, ours: str, *, names: tuple[str, ...] = ("norm1", "attn", "norm2", "mlp")
) -> list[weight_map.Rule]:
    """The rules of one residual attention block."""
    norm1, attn, norm2, mlp = (f"{ours}/{name}" for name in names)
    return [
        *weight_map.norm_rules(f"{theirs}.ln_1", norm1),
        *weight_map.packed_attention(f"{theirs}.attn", attn),
        *weight_map.norm_rules(f"{theirs}.ln_2", norm2),
        *weight_map.linear_rules(f"{theirs}.mlp.c_fc", f"{mlp}/fc1"),
        *weight_map.linear_rules(f"{theirs}.mlp.c_proj", f"{mlp}/fc2"),
    ]


def pooler_map(pooler: AttentionalPooler, context_width: int) -> list[weight_map.Rule]:
    """The rules of `visual.attn_pool*`, and of the norm that stands behind a shared one."""
    tokens_width = pooler.width if pooler.layout == "cascade" else context_width
    found = _queries("visual.attn_pool", "captioning", packed=context_width == pooler.width)
    if pooler.layout == "shared":
        return [*found, *weight_map.norm_rules("visual.ln_post", "norm")]
    packed = tokens_width == pooler.width
    return found + _queries("visual.attn_pool_contrastive", "contrastive", packed=packed)


def _queries(theirs: str, ours: str, *, packed: bool) -> list[weight_map.Rule]:
    """torch packs q, k, v into one matrix if the widths are one."""
    attention = weight_map.packed_attention if packed else _split_attention
    return [
        weight_map.copy_rule(f"{theirs}.query", f"{ours}/query"),
        *weight_map.norm_rules(f"{theirs}.ln_q", f"{ours}/query_norm"),
        *weight_map.norm_rules(f"{theirs}.ln_k", f"{ours}/context_norm"),
        *attention(f"{theirs}.attn", f"{ours}/attn"),
    ]


def _split_attention(theirs: str, ours: str) -> list[weight_map.Rule]:
    biases = tuple(f"{ours}/{n}/bias" for n in "qkv")
    return [
        *(
            weight_map.transpose_rule(f"{theirs}.{n}_proj_weight", f"{ours}/{n}/kernel")
            for n in "qkv"
        ),
        weight_map.Rule(
            (f"{theirs}.in_proj_bias",),
            biases,
            lambda bias: tuple(np.split(bias, 3)),
            lambda *parts: (np.concatenate(parts),),
        ),
        *weight_map.linear_rules(f"{theirs}.out_proj", f"{ours}/out"),
    ]


def coca_fields_from(cfg: Mapping[str, Any], epsilon: float) -> dict[str, Any]:
    """`decoder` and `image_pooler` of an open_clip CoCa config; {} for a CLIP's.

    Raises ValueError for one whose parts do not fit together.
    """
    vision, own = cfg["vision_cfg"], cfg.get("multimodal_cfg")
    if own is None:
        return {}
    unknown = [f"{k}={v!r}" for k, v in own.items() if k not in MULTIMODAL_KEYS and v]
    layout = vision.get("attentional_pool")
    if unknown or not layout or not cfg["text_cfg"].get("embed_cls"):
        raise ValueError(
            f"open_clip CoCa with attentional_pool={layout!r}, "
            f"embed_cls={cfg['text_cfg'].get('embed_cls')}, and {', '.join(unknown) or 'no more'}: "
            "want an attentional pool and embed_cls, and nothing else"
        )
    width = own.get("width", 512)
    decoder = dict(
        name="transformer",
        width=width,
        depth=own.get("layers", 12),
        mlp_dim=MLP_RATIO * width,
        num_heads=own.get("heads", 8),
        vocab_size=cfg["text_cfg"].get("vocab_size", 49408),
        max_length=own.get("context_length", 77),
        input_from="text_tower",
        cross="block",
        act="quick_gelu" if cfg.get("quick_gelu") else "gelu",
        norm_epsilon=EPSILON,
    )
    pooler = dict(
        name="attentional",
        width=cfg["embed_dim"],
        num_queries=vision.get("attn_pooler_queries", 256),
        num_heads=vision.get("attn_pooler_heads", 8),
        layout=layout if isinstance(layout, str) else "shared",
        norm_epsilon=epsilon,
    )
    return dict(decoder=decoder, image_pooler=pooler)


def coca_fields_to(model: Model) -> dict[str, dict[str, Any]]:
    """{"multimodal_cfg", "vision_cfg", "text_cfg"}: what a CoCa adds to a CLIP's config.

    Raises ValueError for what open_clip cannot express.
    """
    decoder, pooler = model.decoder, model.image_pooler
    if decoder is None and pooler is None:
        return {}
    if decoder is None or pooler is None or not model.text.shifted_class_mask:
        raise ValueError(
            "open_clip's CoCa has a decoder, a pooler and a text tower with pool='class' and "
            "shifted_class_mask=True"
        )
    expected = dict(mlp_dim=MLP_RATIO * decoder.width, norm_epsilon=EPSILON, act=model.text.act)
    wrong = {k: v for k, v in expected.items() if getattr(decoder, k) != v}
    if wrong or decoder.width != pooler.width or pooler.norm_epsilon != model.image.norm_epsilon:
        raise ValueError(
            f"open_clip's CoCa decoder has {expected}, the width of its pooler, and the pooler the "
            "image tower's norm_epsilon"
        )
    return dict(
        multimodal_cfg=dict(
            context_length=decoder.max_length,
            vocab_size=decoder.vocab_size,
            width=decoder.width,
            heads=decoder.num_heads,
            layers=decoder.depth,
        ),
        vision_cfg=dict(
            attentional_pool=True if pooler.layout == "shared" else pooler.layout,
            attn_pooler_queries=pooler.num_queries,
            attn_pooler_heads=pooler.num_heads,
            output_tokens=True,
        ),
        text_cfg=dict(embed_cls=True, output_tokens=True),
    )
