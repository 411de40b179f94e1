"""Conversion of what open_clip's CoCa adds to a CLIP: the decoder and the attentional pooler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from imgtune_jax.errors import UserError
from imgtune_jax.interop import weight_map
from imgtune_jax.models import ImageTextModel
from imgtune_jax.models.decoder import Decoder
from imgtune_jax.models.pooling import AttentionalPooler

LAYER_NORM_EPSILON = 1e-5  # open_clip's default
MLP_RATIO = 4  # in the decoder; open_clip ignores the config's mlp_ratio
MULTIMODAL_KEYS = {  # supported keys of multimodal_cfg
    *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "dim_head"),
    *("n_queries", "attn_pooler_heads"),
}


def decoder_rules(decoder: Decoder) -> list[weight_map.Rule]:
    """Return the rules of `text_decoder`. Raises UserError if open_clip has no such decoder."""
    if decoder.cross != "block" or decoder.input_from != "text_tower" or decoder.context_norm:
        raise UserError(
            f"decoder: cross = {decoder.cross!r}, input_from = {decoder.input_from!r}, "
            f"context_norm = {decoder.context_norm}; open_clip's decoder has cross='block', "
            "input_from='text_tower', context_norm=False"
        )
    cross_names = ("cross_norm", "cross", "cross_norm2", "cross_mlp")
    rules = []
    for i in range(decoder.depth):
        cross = f"text_decoder.cross_attn.{i}"
        rules += residual_block_rules(f"text_decoder.resblocks.{i}", f"blocks_{i}")
        rules += residual_block_rules(cross, f"blocks_{i}", names=cross_names)
        rules += weight_map.norm_rules(f"{cross}.ln_1_kv", f"blocks_{i}/cross_context_norm")
    rules += weight_map.norm_rules("text_decoder.ln_final", "final_norm")
    return [*rules, weight_map.copy_rule("text_decoder.text_projection", "vocabulary/kernel")]


def residual_block_rules(
    theirs: str, ours: str, *, names: tuple[str, ...] = ("norm1", "attn", "norm2", "mlp")
) -> list[weight_map.Rule]:
    """Return the rules of one residual attention block, with modules `names` in this package."""
    norm1, attn, norm2, mlp = (f"{ours}/{name}" for name in names)
    return [
        *weight_map.norm_rules(f"{theirs}.ln_1", norm1),
        *weight_map.packed_attention_rules(f"{theirs}.attn", attn),
        *weight_map.norm_rules(f"{theirs}.ln_2", norm2),
        *weight_map.linear_rules(f"{theirs}.mlp.c_fc", f"{mlp}/fc1"),
        *weight_map.linear_rules(f"{theirs}.mlp.c_proj", f"{mlp}/fc2"),
    ]


def pooler_rules(pooler: AttentionalPooler, context_width: int) -> list[weight_map.Rule]:
    """Return the rules of `visual.attn_pool*` and, for layout "shared", of the norm after it.

    `context_width` is the width of the image tower's tokens.
    """
    rules = _query_rules("visual.attn_pool", "captioning", packed=context_width == pooler.width)
    if pooler.layout == "shared":
        return [*rules, *weight_map.norm_rules("visual.ln_post", "norm")]
    tokens_width = pooler.width if pooler.layout == "cascade" else context_width
    packed = tokens_width == pooler.width
    return rules + _query_rules("visual.attn_pool_contrastive", "contrastive", packed=packed)


def _query_rules(theirs: str, ours: str, *, packed: bool) -> list[weight_map.Rule]:
    """Return the rules of learned queries and their attention.

    `packed`: PyTorch stores the q, k and v matrices as one, as it does for inputs of equal width.
    """
    attention = weight_map.packed_attention_rules if packed else _split_attention_rules
    return [
        weight_map.copy_rule(f"{theirs}.query", f"{ours}/query"),
        *weight_map.norm_rules(f"{theirs}.ln_q", f"{ours}/query_norm"),
        *weight_map.norm_rules(f"{theirs}.ln_k", f"{ours}/context_norm"),
        *attention(f"{theirs}.attn", f"{ours}/attn"),
    ]


def _split_attention_rules(theirs: str, ours: str) -> list[weight_map.Rule]:
    """Return the rules of a torch.nn.MultiheadAttention with separate q, k and v matrices."""
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
            lambda *biases: (np.concatenate(biases),),
        ),
        *weight_map.linear_rules(f"{theirs}.out_proj", f"{ours}/out"),
    ]


def coca_fields_from(cfg: Mapping[str, Any], epsilon: float) -> dict[str, Any]:
    """Convert a CoCa config to {"decoder": …, "image_pooler": …}, and a CLIP config to {}.

    `epsilon` is the image tower's norm_epsilon. Raises UserError for an unsupported CoCa.
    """
    vision, text, multimodal = cfg["vision_cfg"], cfg["text_cfg"], cfg.get("multimodal_cfg")
    if multimodal is None:
        return {}
    unknown = [f"{k}={v!r}" for k, v in multimodal.items() if k not in MULTIMODAL_KEYS and v]
    layout = vision.get("attentional_pool")
    if unknown or not layout or not text.get("embed_cls"):
        raise UserError(
            f"open_clip CoCa: attentional_pool={layout!r}, embed_cls={text.get('embed_cls')!r}, "
            f"unsupported keys of multimodal_cfg: {', '.join(unknown) or 'none'}; expected an "
            "attentional_pool, embed_cls=True and no unsupported key"
        )
    width = multimodal.get("width", 512)
    decoder = dict(
        name="transformer",
        width=width,
        depth=multimodal.get("layers", 12),
        mlp_dim=MLP_RATIO * width,
        num_heads=multimodal.get("heads", 8),
        vocab_size=text.get("vocab_size", 49408),
        max_length=multimodal.get("context_length", 77),
        input_from="text_tower",
        cross="block",
        act="quick_gelu" if cfg.get("quick_gelu") else "gelu",
        norm_epsilon=LAYER_NORM_EPSILON,
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


def coca_fields_to(model: ImageTextModel) -> dict[str, dict[str, Any]]:
    """Return what a CoCa adds to the open_clip config of a CLIP, or {} for a CLIP.

    The additions are grouped under "multimodal_cfg", "vision_cfg" and "text_cfg". Raises UserError
    for a model that open_clip cannot express.
    """
    decoder, pooler = model.decoder, model.image_pooler
    if decoder is None and pooler is None:
        return {}
    if decoder is None or pooler is None or not model.text.shifted_class_mask:
        raise UserError(
            "open_clip's CoCa cannot express this model; expected a decoder, an image_pooler and "
            "a text tower with pool='class' and shifted_class_mask=True"
        )
    _check_decoder_and_pooler(model)
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


def _check_decoder_and_pooler(model: ImageTextModel) -> None:
    decoder, pooler = model.decoder, model.image_pooler
    expected = {
        "decoder.mlp_dim": (decoder.mlp_dim, MLP_RATIO * decoder.width),
        "decoder.norm_epsilon": (decoder.norm_epsilon, LAYER_NORM_EPSILON),
        "decoder.act": (decoder.act, model.text.act),
        "decoder.use_bias": (decoder.use_bias, True),
        "decoder.vocab_bias": (decoder.vocab_bias, False),
        "decoder.width": (decoder.width, pooler.width),
        "image_pooler.norm_epsilon": (pooler.norm_epsilon, model.image.norm_epsilon),
    }
    errors = [
        f"{k} = {got!r}; expected {want!r}" for k, (got, want) in expected.items() if got != want
    ]
    if errors:
        raise UserError("this model is not an open_clip CoCa:\n  " + "\n  ".join(errors))
