"""open_clip's names for a ViT and a text transformer, both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from imgtune_jax.interop import open_clip_coca, weight_map
from imgtune_jax.models import Model, positions
from imgtune_jax.models.heads import IdentityHead, LinearHead
from imgtune_jax.models.text_transformer import TextTransformer
from imgtune_jax.models.vit import ViT
from imgtune_jax.types import Params

# What the state dicts of OpenAI's own models carry besides weights.
NON_WEIGHTS = r"input_resolution|context_length|vocab_size|attn_mask|text\.attn_mask"
TEXT_ROOTS = ("cls_emb", "token_embedding", "positional_embedding", "transformer", "ln_final")


def image_map(tower: ViT) -> list[weight_map.Rule]:
    """The rules of `visual.*`, but for the projection, which is a head here.

    The class token's position is added to the token; on the way back it is zero. A grid of
    positions of another size is resized to the tower's. Raises ValueError for a ViT that open_clip
    has no names for.
    """
    if not tower.class_token or tower.num_registers or tower.pool == "attention":
        raise ValueError(
            "open_clip's own ViT has one class token, no registers and no attention pooling; got "
            f"class_token={tower.class_token}, num_registers={tower.num_registers}, "
            f"pool={tower.pool!r}"
        )
    grid = tower.image_size // tower.patch_size
    fixed = tower.positions == "sincos"

    def fold(token: np.ndarray, position: np.ndarray) -> weight_map.Arrays:
        patches = np.asarray(positions.resize_pos_embed(position[1:], grid**2))
        return token[None] + position[:1], patches

    def unfold(token: np.ndarray, position: np.ndarray) -> weight_map.Arrays:
        return token[0], np.concatenate([np.zeros_like(token), position])

    if fixed:
        raise ValueError("open_clip stores its positions: use positions='learned'")
    embed = ("visual.class_embedding", "visual.positional_embedding")
    found = [
        weight_map.conv_rule("visual.conv1.weight", "patch_embed/kernel"),
        weight_map.Rule(embed, ("class_token", "pos_embed"), fold, unfold),
    ]
    if tower.patch_bias:
        raise ValueError("open_clip's ViT has no bias in its patch embedding: use patch_bias=False")
    if tower.pre_norm:
        found += weight_map.norm_rules("visual.ln_pre", "pre_norm")
    found += block_map("visual.transformer.resblocks", tower.depth)
    if tower.final_norm == "none":  # a pooler's own norm bears the name
        return found
    return [*found, *weight_map.norm_rules("visual.ln_post", "final_norm")]


def text_map(tower: TextTransformer) -> list[weight_map.Rule]:
    """The rules of the text tower, but for the projection. Raises ValueError like `image_map`."""
    if tower.pool not in ("eot", "last", "first", "class"):
        raise ValueError(
            f"open_clip has no text pooling {tower.pool!r}; want eot, last, first or class"
        )
    token = weight_map.Rule(("cls_emb",), ("class_token",), lambda x: (x[None],), lambda x: (x[0],))
    return [
        *([token] if tower.pool == "class" else []),
        weight_map.copy_rule("token_embedding.weight", "token_embed/embedding"),
        weight_map.copy_rule("positional_embedding", "pos_embed"),
        *block_map("transformer.resblocks", tower.depth),
        *weight_map.norm_rules("ln_final", "final_norm"),
    ]


def block_map(theirs: str, depth: int) -> list[weight_map.Rule]:
    """The rules of `depth` residual attention blocks."""
    pairs = [(f"{theirs}.{i}", f"blocks_{i}") for i in range(depth)]
    return [rule for pair in pairs for rule in open_clip_coca.residual_block(*pair)]


def open_clip_rules(model: Model) -> list[weight_map.Rule]:
    """The rules of a whole model. Raises ValueError for parts that open_clip's CLIP lacks."""
    if not isinstance(model.image, ViT) or not isinstance(model.text, TextTransformer):
        raise ValueError(
            f"open_clip: no weight map for {type(model.image).__name__} with "
            f"{type(model.text).__name__}; want ViT with TextTransformer"
        )
    found = [_with_prefix("image", rule) for rule in image_map(model.image)]
    found += [_with_prefix("text", rule) for rule in text_map(model.text)]
    if model.decoder is not None:
        found += [
            _with_prefix("decoder", rule) for rule in open_clip_coca.decoder_map(model.decoder)
        ]
    if model.image_pooler is not None:
        own = open_clip_coca.pooler_map(model.image_pooler, model.image.width)
        found += [_with_prefix("image_pooler", rule) for rule in own]
    if not isinstance(model.image_head, LinearHead) or model.image_head.use_bias:
        raise ValueError("open_clip projects images by a matrix: want a linear head without bias")
    found.append(weight_map.copy_rule("visual.proj", "image_head/kernel"))
    if isinstance(model.text_head, LinearHead) and model.text_head.use_bias:
        found += weight_map.linear_rules("text_projection", "text_head")
    elif isinstance(model.text_head, LinearHead):
        found.append(weight_map.copy_rule("text_projection", "text_head/kernel"))
    elif not isinstance(model.text_head, IdentityHead):
        raise ValueError("open_clip projects texts by at most one linear map")
    scalars = ["logit_scale"] if model.logit_bias_init is None else ["logit_scale", "logit_bias"]
    return found + [weight_map.Rule((n,), (n,), _to_scalar, _to_scalar) for n in scalars]


def load_open_clip(state: Mapping[str, np.ndarray], model: Model) -> Params:
    """The model's parameters from a CLIP's, CustomTextCLIP's or CoCa's state dict."""
    return weight_map.to_params(
        plain_names(state),
        open_clip_rules(model),
        model.abstract_params(),
        what="the open_clip model",
        ignore=NON_WEIGHTS,
    )


def save_open_clip(
    params: Params, model: Model, *, custom_text: bool = False
) -> dict[str, np.ndarray]:
    """open_clip's state dict; `custom_text` for a model whose text tower is a module `text`.

    A CoCa's always is.
    """
    state = weight_map.to_state_dict(params, open_clip_rules(model))
    if not custom_text and model.decoder is None:
        return state
    roots = (*TEXT_ROOTS, "text_projection")
    return {f"text.{n}" if n.partition(".")[0] in roots else n: x for n, x in state.items()}


def load_open_clip_tower(
    state: Mapping[str, np.ndarray], tower: ViT | TextTransformer, expected: Params
) -> Params:
    """One tower's parameters out of a whole model's state dict; the rest is left aside."""
    found = image_map(tower) if isinstance(tower, ViT) else text_map(tower)
    names = plain_names(state)
    text = "|".join(TEXT_ROOTS)
    own = r"visual\.(?!proj$).*" if isinstance(tower, ViT) else rf"({text})(\..*)?"
    part = {name: x for name, x in names.items() if re.fullmatch(own, name)}
    return weight_map.to_params(
        part, found, expected, what=f"the {type(tower).__name__} of open_clip"
    )


def plain_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """CustomTextCLIP's `text.*` under CLIP's names."""
    return {name.removeprefix("text."): x for name, x in state.items()}


def _to_scalar(x: np.ndarray) -> weight_map.Arrays:
    return (x.reshape(()),)  # some open_clip models store the scale as [1]


def _with_prefix(root: str, rule: weight_map.Rule) -> weight_map.Rule:
    ours = tuple(f"{root}/{path}" for path in rule.ours)
    return weight_map.Rule(rule.theirs, ours, rule.forward, rule.backward)
