"""Parameter trees by path.

A path joins the keys of nested dicts, as in 'image/blocks_3/attn/q/kernel'. Every function here
takes and returns plain nested dicts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import traverse_util

from imgtune_jax.types import Params

V = TypeVar("V")


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """{path: leaf} of a tree."""
    return traverse_util.flatten_dict(dict(params), sep="/")


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def param_paths(params: Params) -> list[str]:
    """All paths of a tree, concrete or abstract, sorted."""
    return sorted(flatten(params))


def path_str(path: tuple[Any, ...]) -> str:
    """A JAX key path as 'image/blocks_0/attn/q/kernel'."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def split(params: Params, is_frozen: Mapping[str, bool]) -> tuple[Params, Params]:
    """Split a tree into (trainable, frozen) trees, each with its own paths only."""
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for path, value in flatten(params).items():
        parts[is_frozen[path]][path] = value
    trainable, frozen = map(unflatten, parts)
    return trainable, frozen


def merge(trainable: Params, frozen: Params) -> Params:
    """Merge two trees without common paths: the inverse of `split`."""
    return unflatten(flatten(frozen) | flatten(trainable))


def select(params: Params, keep: Callable[[str], bool]) -> Params:
    """The tree of the paths for which `keep` is true."""
    return unflatten({path: value for path, value in flatten(params).items() if keep(path)})


def map_with_path(f: Callable[[str], Any], params: Params) -> Params:
    """A tree of f(path), with the structure of `params`."""
    return unflatten({path: f(path) for path in flatten(params)})


def match_rules(rules: Sequence[tuple[str, V]], paths: Iterable[str], what: str) -> dict[str, V]:
    """The value of the first rule that matches each path.

    A rule is (regular expression, value); the expression must match the full path. Raises
    ValueError listing the paths that no rule matches and the rules that match no path. `what` is
    the config key that the error names.
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
    unused = [rules[i][0] for i in range(len(rules)) if i not in used and rules[i][0] != ".*"]
    if unmatched or unused:
        lines = [f"{what}: the rules do not fit the parameters"]
        if unmatched:
            lines.append(
                f"no rule matches {unmatched[:5]} ({len(unmatched)} in total); add ('.*', …)"
            )
        if unused:
            example = next(iter(out), "")
            lines.append(f"these rules match no parameter: {unused}; a path looks like {example!r}")
        raise ValueError("\n  ".join(lines))
    return out


def params_digest(params: Params) -> str:
    """sha256 over paths, shapes, dtypes and bytes: equal trees have equal digests on any mesh."""
    h = hashlib.sha256()
    for path, x in sorted(flatten(params).items()):
        host = np.asarray(jax.device_get(x))
        h.update(f"{path} {host.shape} {host.dtype}\n".encode())
        h.update(np.ascontiguousarray(host).tobytes())
    return h.hexdigest()
