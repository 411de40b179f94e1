"""Locking and per-path multipliers: one idiom, regular expressions on parameter paths.

A parameter's path is 'image/blocks_3/attn/q/kernel'. Rules are (regex matched in full, value);
the first match wins and every parameter must match one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from flax import traverse_util

from imgtune_jax import config as config_lib
from imgtune_jax import models
from imgtune_jax.types import Params

V = TypeVar("V")

# Statistics of a standardising head are measured, never trained.
STATISTICS = re.compile(r"(?:image|text)_head/(?:.*/)?input_(?:mean|std)")


def match(rules: Sequence[tuple[str, V]], paths: Iterable[str], what: str) -> dict[str, V]:
    """The value of the first rule that matches each path.

    Raises ValueError listing the paths that no rule matches and the rules that match no path.
    """
    compiled = [(re.compile(pattern), value) for pattern, value in rules]
    out: dict[str, V] = {}
    unmatched, used = [], set()
    for path in paths:
        hits = [i for i, (pattern, _) in enumerate(compiled) if pattern.fullmatch(path)]
        used.update(hits)
        if hits:
            out[path] = compiled[hits[0]][1]
        else:
            unmatched.append(path)
    idle = [rules[i][0] for i in range(len(rules)) if i not in used and rules[i][0] != ".*"]
    if unmatched or idle:
        lines = [f"{what}: rules do not fit the parameters"]
        if unmatched:
            lines.append(
                f"no rule matches {unmatched[:5]} ({len(unmatched)} in all); add ('.*', …)"
            )
        if idle:
            lines.append(
                f"these match no parameter: {idle}; a path looks like {next(iter(out), '')!r}"
            )
        raise ValueError("\n  ".join(lines))
    return out


def frozen_paths(cfg: config_lib.Lock, paths: Sequence[str]) -> dict[str, bool]:
    """{path: is it locked} for all parameters. Raises ValueError for a rule that does not fit."""
    locked = {p for p in paths if STATISTICS.fullmatch(p)}
    for tower in ("image", "text"):
        if getattr(cfg, f"{tower}_head"):
            locked |= {p for p in paths if p.startswith(f"{tower}_head/")}
        if not getattr(cfg, tower):
            if getattr(cfg, f"{tower}_unlocked_layers"):
                raise ValueError(
                    f"config.lock.{tower}_unlocked_layers needs config.lock.{tower}=True"
                )
            continue
        mine = [p for p in paths if p.startswith(f"{tower}/")]
        free = _last_layers(mine, getattr(cfg, f"{tower}_unlocked_layers"), tower)
        locked |= set(mine) - free
    if cfg.logit_scale:
        locked |= {p for p in paths if p in ("logit_scale", "logit_bias")}
    for pattern in cfg.patterns:
        hits = {p for p in paths if re.fullmatch(pattern, p)}
        if not hits:
            raise ValueError(
                f"config.lock.patterns: {pattern!r} matches no parameter; "
                f"a path looks like {paths[0]!r}"
            )
        locked |= hits
    return {p: p in locked for p in paths}


def _last_layers(paths: Sequence[str], n: int, tower: str) -> set[str]:
    if n == 0:
        return set()
    count = depth(paths)
    if not 0 < n <= count:
        raise ValueError(f"config.lock.{tower}_unlocked_layers = {n}; the tower has {count} layers")
    free = set()
    for path in paths:
        layer = layer_index(path)
        if not is_stem(path) if layer is None else layer >= count - n:
            free.add(path)
    return free


def depth(paths: Iterable[str]) -> int:
    """How many layers a tower with these parameters has."""
    layers = [layer for layer in map(layer_index, paths) if layer is not None]
    return max(layers) + 1 if layers else 0


def is_stem(path: str) -> bool:
    """Does this tower parameter feed the layers (embeddings), not belong to or follow them?"""
    return layer_index(path) is None and path.split("/")[1] not in models.TAIL


def layer_index(path: str) -> int | None:
    """The number in 'image/blocks_3/…'; None for a parameter outside the layers."""
    found = re.match(r"(?:image|text)/blocks_(\d+)/", path)
    return int(found.group(1)) if found else None


def split(params: Params, is_frozen: dict[str, bool]) -> tuple[Params, Params]:
    """One tree -> (trainable, frozen), each with its own paths only."""
    flat = traverse_util.flatten_dict(params, sep="/")
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for path, value in flat.items():
        parts[is_frozen[path]][path] = value
    trainable, frozen = (traverse_util.unflatten_dict(p, sep="/") for p in parts)
    return trainable, frozen


def select(params: Params, keep: Callable[[str], bool]) -> Params:
    """The tree of the paths that `keep` accepts."""
    flat = traverse_util.flatten_dict(params, sep="/")
    kept = {path: value for path, value in flat.items() if keep(path)}
    return traverse_util.unflatten_dict(kept, sep="/")


def merge(trainable: Params, frozen: Params) -> Params:
    """The inverse of `split`."""
    flat = traverse_util.flatten_dict(frozen, sep="/") | traverse_util.flatten_dict(
        trainable, sep="/"
    )
    return traverse_util.unflatten_dict(flat, sep="/")


def map_paths(f: Callable[[str], Any], params: Params) -> Params:
    """A tree of f(path), shaped as `params`."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict({p: f(p) for p in flat}, sep="/")
