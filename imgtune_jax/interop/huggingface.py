"""Conversion of BERT weights from Hugging Face's Transformers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from imgtune_jax.interop import weight_map
from imgtune_jax.models.bert import Bert
from imgtune_jax.types import Params

# Heads of the pretraining tasks, and buffers, in Transformers' state dicts.
IGNORED = r"pooler\..*|cls\..*|embeddings\.(position_ids|token_type_ids)"
LAYER_NAMES = (  # (name in Transformers, name in this package)
    ("attention.self.query", "attn/q"),
    ("attention.self.key", "attn/k"),
    ("attention.self.value", "attn/v"),
    ("attention.output.dense", "attn/out"),
    ("intermediate.dense", "mlp/fc1"),
    ("output.dense", "mlp/fc2"),
)


def bert_rules(tower: Bert) -> list[weight_map.Rule]:
    """Return the conversion rules of the tower.

    `pos_embed` is the first `max_length` position embeddings plus the embedding of token type 0.
    The inverse conversion sets the token type embeddings to zero.
    """

    def merge_embeddings(position: np.ndarray, token_type: np.ndarray) -> weight_map.Arrays:
        return (position[: tower.max_length] + token_type[0],)

    def split_embeddings(position: np.ndarray) -> weight_map.Arrays:
        return position, np.zeros((2, position.shape[1]), position.dtype)

    embed = "embeddings"
    positions = (f"{embed}.position_embeddings.weight", f"{embed}.token_type_embeddings.weight")
    rules = [
        weight_map.copy_rule(f"{embed}.word_embeddings.weight", "token_embed/embedding"),
        weight_map.Rule(positions, ("pos_embed",), merge_embeddings, split_embeddings),
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


def load_bert(state: Mapping[str, np.ndarray], tower: Bert, expected: Params) -> Params:
    """Return the tower's parameters from the state dict of a `BertModel`.

    The prefix `bert.` of the names, from models that contain a BertModel, is removed. `expected`
    has the paths and shapes of the result. Raises UserError listing every missing, unexpected and
    misshaped key.
    """
    state = {name.removeprefix("bert."): x for name, x in state.items()}
    return weight_map.to_params(state, bert_rules(tower), expected, what="bert", ignore=IGNORED)
