"""Conversion of weights from and to open_clip's CLIP, CustomTextCLIP and CoCa."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from imgtune_jax.errors import UserError
from imgtune_jax.interop import open_clip_coca, weight_map
from imgtune_jax.models import ImageTextModel, positions
from imgtune_jax.models.heads import IdentityHead, LinearHead
from imgtune_jax.models.text_transformer import TextTransformer
from imgtune_jax.models.vit import ViT
from imgtune_jax.types import Params

# Entries of OpenAI's state dicts that are not weights.
NON_WEIGHTS = r"input_resolution|context_length|vocab_size|attn_mask|text\.attn_mask"
OPENAI_ENTRY = "input_resolution"
# The first part of every name in the text tower of a CLIP.
TEXT_ROOTS = ("cls_emb", "token_embedding", "positional_embedding", "transformer", "ln_final")


def image_rules(tower: ViT) -> list[weight_map.Rule]:
    """Return the rules of `visual.*` without the projection, which is a head in this package.

    On import, the class token's position embedding is added to the class token, and position
    embeddings of another grid size are resized to the tower's. On export, the class token's
    position embedding is zero. Raises UserError for a ViT that open_clip cannot express.
    """
    _check_vit(tower)
    num_patches = (tower.image_size // tower.patch_size) ** 2

    def merge_class_position(token: np.ndarray, position: np.ndarray) -> weight_map.Arrays:
        patches = np.asarray(positions.resize_pos_embed(position[1:], num_patches))
        return token[None] + position[:1], patches

    def split_class_position(token: np.ndarray, position: np.ndarray) -> weight_map.Arrays:
        return token[0], np.concatenate([np.zeros_like(token), position])

    rules = [
        weight_map.conv_rule("visual.conv1.weight", "patch_embed/kernel"),
        weight_map.Rule(
            ("visual.class_embedding", "visual.positional_embedding"),
            ("class_token", "pos_embed"),
            merge_class_position,
            split_class_position,
        ),
    ]
    if tower.pre_norm:
        rules += weight_map.norm_rules("visual.ln_pre", "pre_norm")
    rules += block_rules("visual.transformer.resblocks", tower.depth)
    if tower.final_norm == "none":  # the norm visual.ln_post belongs to the pooler
        return rules
    return [*rules, *weight_map.norm_rules("visual.ln_post", "final_norm")]


def _check_vit(tower: ViT) -> None:
    if not tower.class_token or tower.num_registers or tower.pool == "attention":
        raise UserError(
            f"class_token = {tower.class_token}, num_registers = {tower.num_registers}, "
            f"pool = {tower.pool!r}; open_clip's ViT has one class token, no registers and no "
            "attention pooling"
        )
    if tower.positions == "sincos":
        raise UserError(
            "positions = 'sincos'; open_clip stores position embeddings: use positions='learned'"
        )
    if tower.patch_bias:
        raise UserError(
            "patch_bias = True; open_clip's patch embedding has no bias: use patch_bias=False"
        )


def text_rules(tower: TextTransformer) -> list[weight_map.Rule]:
    """Return the rules of the text tower without the projection, which is a head in this package.

    Raises UserError for a text tower that open_clip cannot express.
    """
    if tower.pool not in ("eot", "last", "first", "class"):
        raise UserError(
            f"text pool = {tower.pool!r}; open_clip can express eot, last, first and class"
        )
    class_token = weight_map.Rule(
        ("cls_emb",), ("class_token",), lambda x: (x[None],), lambda x: (x[0],)
    )
    return [
        *([class_token] if tower.pool == "class" else []),
        weight_map.copy_rule("token_embedding.weight", "token_embed/embedding"),
        weight_map.copy_rule("positional_embedding", "pos_embed"),
        *block_rules("transformer.resblocks", tower.depth),
        *weight_map.norm_rules("ln_final", "final_norm"),
    ]


def block_rules(theirs: str, depth: int) -> list[weight_map.Rule]:
    """Return the rules of the residual attention blocks `theirs`.0, …, `theirs`.(depth - 1)."""
    names = [(f"{theirs}.{i}", f"blocks_{i}") for i in range(depth)]
    return [rule for pair in names for rule in open_clip_coca.residual_block_rules(*pair)]


def open_clip_rules(model: ImageTextModel) -> list[weight_map.Rule]:
    """Return the rules of a full model. Raises UserError if open_clip cannot express it."""
    if not isinstance(model.image, ViT) or not isinstance(model.text, TextTransformer):
        raise UserError(
            f"model: {type(model.image).__name__} with {type(model.text).__name__}; open_clip's "
            "weights fit a ViT with a TextTransformer"
        )
    rules = _with_prefix("image", image_rules(model.image))
    rules += _with_prefix("text", text_rules(model.text))
    if model.decoder is not None:
        rules += _with_prefix("decoder", open_clip_coca.decoder_rules(model.decoder))
    if model.image_pooler is not None:
        pooler = open_clip_coca.pooler_rules(model.image_pooler, model.image.width)
        rules += _with_prefix("image_pooler", pooler)
    rules += _head_rules(model)
    scalars = ["logit_scale"] if model.logit_bias_init is None else ["logit_scale", "logit_bias"]
    return rules + [weight_map.Rule((n,), (n,), _to_scalar, _to_scalar) for n in scalars]


def _head_rules(model: ImageTextModel) -> list[weight_map.Rule]:
    image_head, text_head = model.image_head, model.text_head
    if not isinstance(image_head, LinearHead) or image_head.use_bias:
        raise UserError(
            f"image_head = {type(image_head).__name__}; open_clip's head is one matrix: use a "
            "linear head with use_bias=False"
        )
    rules = [weight_map.copy_rule("visual.proj", "image_head/kernel")]
    if isinstance(text_head, LinearHead) and text_head.use_bias:
        return rules + weight_map.linear_rules("text_projection", "text_head")
    if isinstance(text_head, LinearHead):
        return [*rules, weight_map.copy_rule("text_projection", "text_head/kernel")]
    if isinstance(text_head, IdentityHead):
        return rules
    raise UserError(
        f"text_head = {type(text_head).__name__}; open_clip can express a linear or identity head"
    )


def load_open_clip(state: Mapping[str, np.ndarray], model: ImageTextModel) -> Params:
    """Return the model's parameters from the state dict of a CLIP, CustomTextCLIP or CoCa.

    Raises UserError listing every missing, unexpected and misshaped key, and for OpenAI's weights
    with an activation other than theirs.
    """
    state = plain_names(state)
    for tower in (model.image, model.text):
        _check_activation(state, tower)
    return weight_map.to_params(
        state,
        open_clip_rules(model),
        model.abstract_params(),
        what="the open_clip model",
        ignore=NON_WEIGHTS,
    )


def save_open_clip(
    params: Params, model: ImageTextModel, *, custom_text: bool = False
) -> dict[str, np.ndarray]:
    """Return the parameters as open_clip's state dict.

    With `custom_text`, and always for a CoCa, the text tower's names begin with `text.`, as in
    open_clip's CustomTextCLIP.
    """
    state = weight_map.to_state_dict(params, open_clip_rules(model))
    if not custom_text and model.decoder is None:
        return state
    roots = (*TEXT_ROOTS, "text_projection")
    return {f"text.{n}" if n.partition(".")[0] in roots else n: x for n, x in state.items()}


def load_open_clip_tower(
    state: Mapping[str, np.ndarray], tower: ViT | TextTransformer, expected: Params
) -> Params:
    """Return one tower's parameters from the state dict of a full model.

    `expected` has the paths and shapes of the result. Raises UserError listing every missing,
    unexpected and misshaped key, and for OpenAI's weights with an activation other than theirs.
    """
    state = plain_names(state)
    _check_activation(state, tower)
    rules = image_rules(tower) if isinstance(tower, ViT) else text_rules(tower)
    roots = "|".join(TEXT_ROOTS)
    pattern = r"visual\.(?!proj$).*" if isinstance(tower, ViT) else rf"({roots})(\..*)?"
    tower_state = {n: x for n, x in state.items() if re.fullmatch(pattern, n)}
    return weight_map.to_params(
        tower_state, rules, expected, what=f"the {type(tower).__name__} of open_clip"
    )


def _check_activation(state: Mapping[str, np.ndarray], tower: Any) -> None:
    """Raise UserError for OpenAI's weights, which alone have OPENAI_ENTRY, without quick_gelu."""
    act = getattr(tower, "act", "quick_gelu")
    if OPENAI_ENTRY in state and act != "quick_gelu":
        raise UserError(
            f"act = {act!r}; these are OpenAI's weights, since they have the entry "
            f"{OPENAI_ENTRY}, and they were trained with act='quick_gelu'"
        )


def plain_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename the entries of a CustomTextCLIP as in a CLIP: remove the prefix `text.`.

    A prefix that all names share, such as `module.`, is removed too.
    """
    state = weight_map.strip_shared_prefix(state, ("visual", "text", *TEXT_ROOTS))
    return {name.removeprefix("text."): x for name, x in state.items()}


def _to_scalar(x: np.ndarray) -> weight_map.Arrays:
    return (x.reshape(()),)  # some open_clip models store the scale with shape [1]


def _with_prefix(root: str, rules: Iterable[weight_map.Rule]) -> list[weight_map.Rule]:
    return [
        dataclasses.replace(rule, ours=tuple(f"{root}/{path}" for path in rule.ours))
        for rule in rules
    ]
