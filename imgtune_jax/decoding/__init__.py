"""Decoding: from a model's next-token step to texts, and from given texts to their likelihood.

A method is one dataclass in `settings.py` and one line in `METHODS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from imgtune_jax.decoding.answers import answer_scores
from imgtune_jax.decoding.generate import Generator, generate
from imgtune_jax.decoding.settings import Beam, Decoding, Generated, Greedy, Sample
from imgtune_jax.decoding.start import bucket, pad_prompts

__all__ = [
    "METHODS",
    "Beam",
    "Decoding",
    "Generated",
    "Generator",
    "Greedy",
    "Sample",
    "answer_scores",
    "bucket",
    "build",
    "generate",
    "pad_prompts",
]

METHODS: dict[str, type] = {"greedy": Greedy, "beam": Beam, "sample": Sample}


def build(cfg: Mapping[str, Any], *, stop: tuple[int, ...], pad: int) -> Decoding:
    """{"method": {"name": "beam", "width": 4}, "max_length": 32} -> Decoding.

    `stop` and `pad` are the tokenizer's. Raises ValueError for an unknown method or field.
    """
    fields = dict(cfg)
    method = dict(fields.pop("method", {"name": "greedy"}))
    name = method.pop("name", None)
    if name not in METHODS:
        raise ValueError(f"decoding method {name!r} is unknown; known: {', '.join(METHODS)}")
    _check_fields(name, method, METHODS[name])
    _check_fields("decoding", fields, Decoding, given=("stop", "pad", "method"))
    return Decoding(stop=stop, pad=pad, method=METHODS[name](**method), **fields)


def _check_fields(
    what: str, fields: Mapping[str, Any], kind: type, given: tuple[str, ...] = ()
) -> None:
    known = [f.name for f in dataclasses.fields(kind) if f.name not in given]
    if unknown := sorted(set(fields) - set(known)):
        raise ValueError(f"{what} has no {unknown}; known: {', '.join(known)}")
