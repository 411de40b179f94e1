"""Parameter trees by path: flatten, split, merge, select, map, match with regexes, digest.

A tree is a nested dict of arrays. A path joins its keys, as in 'image/blocks_3/attn/q/kernel'.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from imgtune_jax.errors import UserError
from imgtune_jax.types import Params

V = TypeVar("V")


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return {path: leaf} of a tree."""
    return traverse_util.flatten_dict(dict(params), sep="/")


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Return the tree of {path: leaf}: the inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def param_paths(params: Params) -> list[str]:
    """Return all paths of a tree of arrays or abstract arrays, sorted."""
    return sorted(flatten(params))


def path_str(path: tuple[Any, ...]) -> str:
    """Format a `jax.tree_util` key path as 'image/blocks_0/attn/q/kernel'."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def split(params: Params, is_frozen: Mapping[str, bool]) -> tuple[Params, Params]:
    """Split a tree into (trainable, frozen) trees. `is_frozen` must have every path of the tree."""
    trainable, frozen = {}, {}
    for path, leaf in flatten(params).items():
        (frozen if is_frozen[path] else trainable)[path] = leaf
    return unflatten(trainable), unflatten(frozen)


def merge(trainable: Params, frozen: Params) -> Params:
    """Merge two trees without common paths: the inverse of `split`."""
    return unflatten(flatten(frozen) | flatten(trainable))


def select(params: Params, keep: Callable[[str], bool]) -> Params:
    """Return the tree of the leaves whose path satisfies `keep`."""
    return unflatten({path: leaf for path, leaf in flatten(params).items() if keep(path)})


def map_with_path(f: Callable[[str, Any], Any], params: Params) -> Params:
    """Return the tree of f(path, leaf), with the structure of `params`."""
    return unflatten({path: f(path, leaf) for path, leaf in flatten(params).items()})


def compile_pattern(pattern: str, key: str) -> re.Pattern[str]:
    """Compile a regular expression. Raises UserError that names `key`, the config key of it."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"{key} has {pattern!r}, which is not a regular expression ({error}); correct it"
        ) from error


def match_rules(rules: Sequence[tuple[str, V]], paths: Iterable[str], key: str) -> dict[str, V]:
    """Return {path: value of the first rule that matches it}.

    A rule is (regular expression, value); the expression must match the full path. Raises
    UserError listing the paths that no rule matches and the rules, other than '.*', that match no
    path. The error names `key`, the config key of the rules.
    """
    compiled = [(compile_pattern(pattern, key), value) for pattern, value in rules]
    values: dict[str, V] = {}
    unmatched, used = [], set()
    for path in paths:
        matching = [i for i, (pattern, _) in enumerate(compiled) if pattern.fullmatch(path)]
        used.update(matching)
        if matching:
            values[path] = compiled[matching[0]][1]
        else:
            unmatched.append(path)
    unused = [rules[i][0] for i in range(len(rules)) if i not in used and rules[i][0] != ".*"]
    if unmatched or unused:
        lines = [f"{key}: the rules do not fit the parameters"]
        if unmatched:
            lines.append(
                f"no rule matches {unmatched[:5]} ({len(unmatched)} in total); add ('.*', …)"
            )
        if unused:
            example = next(iter(values), "")
            lines.append(
                f"these rules match no parameter: {unused}; correct or remove them; "
                f"a path looks like {example!r}"
            )
        raise UserError("\n  ".join(lines))
    return values


def check_finite(params: Params, what: str) -> None:
    """Raise UserError naming the first paths with NaN or infinite values, if there are any.

    `what` is the subject of the message. Of arrays on several hosts, each host checks its shards.
    """
    flat = flatten(params)
    bad = sorted(path for path, leaf in flat.items() if not _is_finite(leaf))
    if bad:
        raise UserError(
            f"{what}: {len(bad)} of {len(flat)} arrays have values that are not finite: "
            f"{', '.join(bad[:3])}{', …' if len(bad) > 3 else ''}; use another checkpoint"
        )


def _is_finite(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array):
        shards = [shard.data for shard in leaf.addressable_shards if shard.replica_id == 0]
    else:
        shards = [leaf]
    return all(bool(np.isfinite(np.asarray(x)).all()) for x in shards)


def params_digest(params: Params) -> str:
    """Return the SHA-256 of paths, shapes, dtypes and values; it does not depend on sharding.

    All hosts return the same digest. Those that share an array gather it, one array at a time.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(params).items()):
        array = np.asarray(_gather(leaf))
        digest.update(f"{path} {array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _gather(leaf: Any) -> Any:
    """Return the whole of an array, of which this host may hold only some shards."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return multihost_utils.process_allgather(leaf, tiled=True)
    return leaf
