"""Conversion of BERT weights from Hugging Face's Transformers, and of the configs beside them.

RoBERTa, XLM-RoBERTa and CamemBERT are BERTs whose positions begin after the id of padding, so the
first rows of their position tables are not used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from imgtune_jax.errors import UserError
from imgtune_jax.interop import weight_map
from imgtune_jax.interop.stated_fields import StatedFields
from imgtune_jax.interop.weight_files import read_json
from imgtune_jax.models.bert import Bert
from imgtune_jax.types import Params

CONFIG_FILE = "config.json"
# Heads of the pretraining tasks, and buffers, in Transformers' state dicts.
IGNORED = r"(pooler|cls|lm_head|classifier)\..*|embeddings\.(position_ids|token_type_ids)"
# First parts of the names in a `BertModel`, in a model that contains one, and in its heads.
ROOTS = ("embeddings", "encoder", "pooler", "cls", "lm_head", "classifier")
POSITIONS = "embeddings.position_embeddings.weight"
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
LAYER_NAMES = (  # (name in Transformers, name in this package)
    ("attention.self.query", "attn/q"),
    ("attention.self.key", "attn/k"),
    ("attention.self.value", "attn/v"),
    ("attention.output.dense", "attn/out"),
    ("intermediate.dense", "mlp/fc1"),
    ("output.dense", "mlp/fc2"),
)
ROBERTA_TYPES = ("roberta", "xlm-roberta", "camembert")
ROBERTA_PADDING_ID = 1
CONFIG_FIELDS = {  # key of config.json -> field of Bert
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "vocab_size": "vocab_size",
    "layer_norm_eps": "norm_epsilon",
}
ACTIVATIONS = {  # hidden_act -> act, where the names differ
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
}
# Keys of config.json whose value is the same for all models that this package can represent.
FIXED_FIELDS = {"model_type": "bert", "position_embedding_type": "absolute", "is_decoder": False}
POOLS = {  # key of a sentence-transformers pooling config -> pool
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}


def bert_rules(tower: Bert, *, first_position: int = 0) -> list[weight_map.Rule]:
    """Return the conversion rules of the tower.

    `pos_embed` is `max_length` position embeddings, from the row `first_position` on, plus the
    embedding of token type 0. The inverse conversion sets the token type embeddings, and the rows
    before `first_position`, to zero.
    """

    def merge_embeddings(position: np.ndarray, token_type: np.ndarray) -> weight_map.Arrays:
        used = position[first_position : first_position + tower.max_length]
        return (used + token_type[0],)

    def split_embeddings(position: np.ndarray) -> weight_map.Arrays:
        unused, token_types = (
            np.zeros((n, position.shape[1]), position.dtype) for n in (first_position, 2)
        )
        return np.concatenate([unused, position]), token_types

    embed = "embeddings"
    rules = [
        weight_map.copy_rule(f"{embed}.word_embeddings.weight", "token_embed/embedding"),
        weight_map.Rule(
            (POSITIONS, TOKEN_TYPES), ("pos_embed",), merge_embeddings, split_embeddings
        ),
        *weight_map.norm_rules(f"{embed}.LayerNorm", "embed_norm"),
    ]
    for i in range(tower.depth):
        their_layer, our_layer = f"encoder.layer.{i}", f"blocks_{i}"
        for theirs, ours in LAYER_NAMES:
            rules += weight_map.linear_rules(f"{their_layer}.{theirs}", f"{our_layer}/{ours}")
        attention_norm = f"{their_layer}.attention.output.LayerNorm"
        rules += weight_map.norm_rules(attention_norm, f"{our_layer}/norm1")
        rules += weight_map.norm_rules(f"{their_layer}.output.LayerNorm", f"{our_layer}/norm2")
    return rules


def load_bert(
    state: Mapping[str, np.ndarray],
    tower: Bert,
    expected: Params,
    *,
    config: Mapping[str, Any] | None = None,
) -> Params:
    """Return the tower's parameters from the state dict of a BERT or RoBERTa.

    The prefixes `bert.` and `roberta.` of the names, from models that contain another model, are
    removed. `expected` has the paths and shapes of the result. `config` is the content of
    config.json, from which the first position is read. Raises UserError listing every missing,
    unexpected and misshaped key.
    """
    plain = {_plain_name(n): x for n, x in weight_map.strip_shared_prefix(state, ROOTS).items()}
    first_position = _first_position(state, plain, config or {})
    rules = bert_rules(tower, first_position=first_position)
    return weight_map.to_params(plain, rules, expected, what="bert", ignore=IGNORED)


def _plain_name(name: str) -> str:
    """Return the name in a `BertModel`; TensorFlow's gamma and beta become weight and bias."""
    name = re.sub(r"^(bert|roberta)\.", "", name)
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))


def _first_position(
    state: Mapping[str, np.ndarray], plain: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> int:
    """Return the row of the position table for a text's first token."""
    model_type = config.get("model_type")
    if model_type in ROBERTA_TYPES or (
        model_type is None and any("roberta." in name for name in state)
    ):
        padding_id = config.get("pad_token_id")
        return 1 + (ROBERTA_PADDING_ID if padding_id is None else int(padding_id))
    if model_type is None and len(plain.get(TOKEN_TYPES, ())) == 1:
        raise UserError(
            "the weights have one token type, as in RoBERTa, whose positions begin after the id of "
            f"padding; put the model's {CONFIG_FILE} beside the weights, so that its model_type "
            "is known"
        )
    return 0


def stated_fields(folder: Path, modality: str) -> StatedFields:
    """Return the fields of Bert in config.json, and the pool of sentence-transformers."""
    del modality  # a BERT is a text tower
    stated: StatedFields = {}
    if (path := folder / CONFIG_FILE).is_file():
        stated[CONFIG_FILE] = bert_fields(read_json(path))
    for path in sorted(folder.glob("*_Pooling/config.json")):
        pooling = read_json(path)
        modes = [k for k, v in pooling.items() if k.startswith("pooling_mode_") and v is True]
        name = path.relative_to(folder).as_posix()
        stated[name] = {"pool": "+".join(POOLS.get(mode, mode) for mode in modes)} if modes else {}
    return stated


def bert_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of Bert, and the FIXED_FIELDS, that a config.json states."""
    fields = {ours: config[theirs] for theirs, ours in CONFIG_FIELDS.items() if theirs in config}
    if (act := config.get("hidden_act")) is not None:
        fields["act"] = ACTIVATIONS.get(act, act)
    fields |= {name: config.get(name, default) for name, default in FIXED_FIELDS.items()}
    if fields["model_type"] in ROBERTA_TYPES:
        fields["model_type"] = FIXED_FIELDS["model_type"]
    return fields
