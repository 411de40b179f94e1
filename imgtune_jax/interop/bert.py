"""BERT weights under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from imgtune_jax.interop import rules
from imgtune_jax.models.bert import Bert
from imgtune_jax.types import Params

# Heads of the pre-training tasks, and a constant.
NOT_USED = r"pooler\..*|cls\..*|embeddings\.(position_ids|token_type_ids)"
LAYER = (
    ("attention.self.query", "attn/q"),
    ("attention.self.key", "attn/k"),
    ("attention.self.value", "attn/v"),
    ("attention.output.dense", "attn/out"),
    ("intermediate.dense", "mlp/fc1"),
    ("output.dense", "mlp/fc2"),
)


def weight_map(tower: Bert) -> list[rules.Rule]:
    """The rules for the tower's layers.

    The first row of the token types is added to the positions, whose first `max_length` rows are
    taken; on the way back the token types are zeros.
    """

    def fold(position: np.ndarray, token_type: np.ndarray) -> rules.Arrays:
        return (position[: tower.max_length] + token_type[0],)

    def unfold(position: np.ndarray) -> rules.Arrays:
        return position, np.zeros((2, position.shape[1]), position.dtype)

    embed = "embeddings"
    position = (f"{embed}.position_embeddings.weight", f"{embed}.token_type_embeddings.weight")
    found = [
        rules.copy(f"{embed}.word_embeddings.weight", "token_embed/embedding"),
        rules.Rule(position, ("pos_embed",), fold, unfold),
        *rules.norm(f"{embed}.LayerNorm", "embed_norm"),
    ]
    for i in range(tower.depth):
        theirs, ours = f"encoder.layer.{i}", f"blocks_{i}"
        for name, own in LAYER:
            found += rules.linear(f"{theirs}.{name}", f"{ours}/{own}")
        found += rules.norm(f"{theirs}.attention.output.LayerNorm", f"{ours}/norm1")
        found += rules.norm(f"{theirs}.output.LayerNorm", f"{ours}/norm2")
    return found


def load(state: Mapping[str, np.ndarray], tower: Bert, expected: Params) -> Params:
    """The tower's parameters from a `BertModel`, or from the `bert.` part of a larger model."""
    state = {name.removeprefix("bert."): x for name, x in state.items()}
    return rules.convert(state, weight_map(tower), expected, what="bert", ignore=NOT_USED)
