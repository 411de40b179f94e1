"""BERT weights under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from imgtune_jax.interop import weight_map
from imgtune_jax.models.bert import Bert
from imgtune_jax.types import Params

# Heads of the pre-training tasks, and a constant.
IGNORED = r"pooler\..*|cls\..*|embeddings\.(position_ids|token_type_ids)"
LAYER_NAMES = (
    ("attention.self.query", "attn/q"),
    ("attention.self.key", "attn/k"),
    ("attention.self.value", "attn/v"),
    ("attention.output.dense", "attn/out"),
    ("intermediate.dense", "mlp/fc1"),
    ("output.dense", "mlp/fc2"),
)


def bert_rules(tower: Bert) -> list[weight_map.Rule]:
    """The rules for the tower's layers.

    The first row of the token types is added to the positions, whose first `max_length` rows are
    taken; on the way back the token types are zeros.
    """

    def fold(position: np.ndarray, token_type: np.ndarray) -> weight_map.Arrays:
        return (position[: tower.max_length] + token_type[0],)

    def unfold(position: np.ndarray) -> weight_map.Arrays:
        return position, np.zeros((2, position.shape[1]), position.dtype)

    embed = "embeddings"
    position = (f"{embed}.position_embeddings.weight", f"{embed}.token_type_embeddings.weight")
    found = [
        weight_map.copy_rule(f"{embed}.word_embeddings.weight", "token_embed/embedding"),
        weight_map.Rule(position, ("pos_embed",), fold, unfold),
        *weight_map.norm_rules(f"{embed}.LayerNorm", "embed_norm"),
    ]
    for i in range(tower.depth):
        theirs, ours = f"encoder.layer.{i}", f"blocks_{i}"
        for name, own in LAYER_NAMES:
            found += weight_map.linear_rules(f"{theirs}.{name}", f"{ours}/{own}")
        found += weight_map.norm_rules(f"{theirs}.attention.output.LayerNorm", f"{ours}/norm1")
        found += weight_map.norm_rules(f"{theirs}.output.LayerNorm", f"{ours}/norm2")
    return found


def load_bert(state: Mapping[str, np.ndarray], tower: Bert, expected: Params) -> Params:
    """The tower's parameters from a `BertModel`, or from the `bert.` part of a larger model."""
    state = {name.removeprefix("bert."): x for name, x in state.items()}
    return weight_map.to_params(state, bert_rules(tower), expected, what="bert", ignore=IGNORED)
