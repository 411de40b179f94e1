"""Generation of token sequences from a model's decode step, and likelihood of given texts.

`METHODS` names the decoding methods. Their settings are the dataclasses of `settings.py`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import typing
from collections.abc import Mapping
from typing import Any

from imgtune_jax.decoding.generate import Generator, generate
from imgtune_jax.decoding.prefill import length_bucket, pad_prompts
from imgtune_jax.decoding.scoring import score_texts
from imgtune_jax.decoding.settings import (
    BeamSearch,
    GeneratedTokens,
    GenerationConfig,
    Greedy,
    Sampling,
)
from imgtune_jax.errors import UserError

__all__ = [
    "METHODS",
    "BeamSearch",
    "GeneratedTokens",
    "GenerationConfig",
    "Generator",
    "Greedy",
    "Sampling",
    "build_generation_config",
    "generate",
    "length_bucket",
    "pad_prompts",
    "score_texts",
]

METHODS: dict[str, type] = {"greedy": Greedy, "beam": BeamSearch, "sample": Sampling}


def build_generation_config(
    cfg: Mapping[str, Any], *, stop_ids: tuple[int, ...], pad_id: int
) -> GenerationConfig:
    """Build settings from a mapping such as {"method": {"name": "beam"}, "max_new_tokens": 32}.

    `stop_ids` and `pad_id` come from the tokenizer. The default method is greedy. Raises UserError
    for an unknown method or field, and for a value of a wrong type or that is not finite.
    """
    fields = dict(cfg)
    method = fields.pop("method", {"name": "greedy"})
    if not isinstance(method, Mapping):
        raise UserError(f"decoding method = {method!r}; expected {{'name': …}}")
    method = dict(method)
    name = method.pop("name", None)
    if name not in METHODS:
        raise UserError(f"decoding method {name!r} is unknown; known: {', '.join(METHODS)}")
    _check_fields(name, method, METHODS[name])
    _check_fields("decoding", fields, GenerationConfig, excluded=("stop_ids", "pad_id", "method"))
    return GenerationConfig(
        stop_ids=stop_ids, pad_id=pad_id, method=METHODS[name](**method), **fields
    )


def _check_fields(
    name: str, fields: Mapping[str, Any], cls: type, excluded: tuple[str, ...] = ()
) -> None:
    """Raise UserError for an unknown or excluded key, and for a value of a wrong type."""
    known = [f.name for f in dataclasses.fields(cls) if f.name not in excluded]
    if unknown := sorted(set(fields) - set(known)):
        raise UserError(f"{name} has unknown fields {unknown}; known: {', '.join(known)}")
    hints = typing.get_type_hints(cls)
    for field, value in fields.items():
        kinds = typing.get_args(hints[field]) or (hints[field],)
        if not any(_is_valid(value, kind) for kind in kinds):
            expected = " or ".join(kind.__name__.replace("NoneType", "None") for kind in kinds)
            raise UserError(f"{name}: {field} = {value!r}; expected a finite {expected}")


def _is_valid(value: Any, kind: Any) -> bool:
    """Whether `value` is of the type `kind`; a float must be finite, and a bool is no number."""
    if isinstance(value, bool) or kind not in (int, float):
        return type(value) is kind
    number = numbers.Integral if kind is int else numbers.Real
    return isinstance(value, number) and math.isfinite(value)
