"""Locking: which parameters a config freezes, and the frozen prefix of each tower.

`config.lock` determines the frozen parameters by path. The contiguous run of frozen modules that
starts at a tower's input is its *frozen prefix*. Its output depends on the input alone, so it can
be cached. The other modules are the *suffix*. Only this file parses the names of layers:
`blocks_<n>`, or `stage<s>_<n>` for block n of stage s of a ResNet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from imgtune_jax.config import LockConfig
from imgtune_jax.errors import UserError
from imgtune_jax.param_tree import compile_pattern
from imgtune_jax.types import MODALITIES

# Modules after the layers, in every tower and in the decoder. All others outside the layers come
# before them.
AFTER_LAYERS = ("final_norm", "pool", "head", "classifier", "vocabulary")

# Statistics of a standardizing head, which are measured (`training/calibrate.py`) and not trained.
STATISTICS = ("input_mean", "input_std")

# Name of a layer's module; the group of the stage is empty for `blocks_<n>`.
_LAYER = re.compile(r"(?:blocks|stage(\d+))_(\d+)")


@dataclass(frozen=True)
class FrozenPrefix:
    """The modules of a tower that are frozen, from its input on.

    `num_layers` = n means the embeddings and the first n layers; -1 means the full tower.
    """

    num_layers: int

    @classmethod
    def from_paths(cls, is_frozen: Mapping[str, bool]) -> FrozenPrefix | None:
        """Return the frozen prefix of a tower, or None if layer 0 or a module before it trains.

        The keys of `is_frozen` are all paths in the tower, such as 'blocks_0/attn/q/kernel'.
        """
        if all(is_frozen.values()):
            return cls(-1)
        module_is_frozen: dict[str, bool] = {}
        for path, frozen in is_frozen.items():
            name = path.partition("/")[0]
            module_is_frozen[name] = module_is_frozen.get(name, True) and frozen
        if not all(frozen for name, frozen in module_is_frozen.items() if is_embedding(name)):
            return None
        n = 0
        while module_is_frozen.get(f"blocks_{n}", False):
            n += 1
        return cls(n) if n else None

    @property
    def is_full_tower(self) -> bool:
        """Whether the full tower is frozen."""
        return self.num_layers == -1

    def contains(self, path: str) -> bool:
        """Whether a path in the tower belongs to the prefix."""
        if self.is_full_tower:
            return True
        layer = layer_index(path)
        return is_embedding(path) if layer is None else layer < self.num_layers


def layer_index(path: str) -> int | None:
    """Return n for a path 'blocks_<n>/…' in a tower, or None for a path outside the layers."""
    match = re.match(r"blocks_(\d+)(?:/|$)", path)
    return int(match.group(1)) if match else None


def layer_depths(paths: Iterable[str]) -> dict[str, int]:
    """Return the depth of each path in a tower or decoder, such as 'blocks_0/attn/q/kernel'.

    The n layers have the depths 1 to n, modules before them have 0, modules after them n + 1.
    """
    position = {path: _layer_position(path) for path in paths}
    depth = {p: i for i, p in enumerate(sorted(set(filter(None, position.values()))), 1)}
    return {
        path: depth[p] if p else (0 if is_embedding(path) else len(depth) + 1)
        for path, p in position.items()
    }


def num_layers(paths: Iterable[str]) -> int:
    """Return the number of layers of a tower, given the paths in it."""
    return len(set(filter(None, map(_layer_position, paths))))


def _layer_position(path: str) -> tuple[int, int] | None:
    """Return (stage, index in the stage) of a path in a layer; the stage of `blocks_<n>` is 0."""
    match = _LAYER.fullmatch(path.partition("/")[0])
    return (int(match[1] or 0), int(match[2])) if match else None


def is_embedding(path: str) -> bool:
    """Whether a path in a tower belongs to a module before the layers."""
    return _layer_position(path) is None and path.partition("/")[0] not in AFTER_LAYERS


def tower_paths(paths: Iterable[str], modality: str) -> list[str]:
    """Return the paths in one tower ('blocks_0/…'), given the model's ('image/blocks_0/…')."""
    prefix = f"{modality}/"
    return [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]


def frozen_paths(cfg: LockConfig, paths: Sequence[str]) -> dict[str, bool]:
    """Return {path: whether it is frozen} for all parameters.

    Raises UserError for a setting that does not fit the parameters.
    """
    frozen = {p for p in paths if _is_statistic(p)}
    for modality in MODALITIES:
        if getattr(cfg, f"{modality}_head"):
            frozen |= {p for p in paths if p.startswith(f"{modality}_head/")}
        num_unlocked = getattr(cfg, f"{modality}_unlocked_layers")
        if getattr(cfg, modality):
            frozen |= _frozen_tower_paths(paths, modality, num_unlocked)
        elif num_unlocked:
            raise UserError(
                f"config.lock.{modality}_unlocked_layers = {num_unlocked} needs "
                f"config.lock.{modality} = True; set it, or set the number to 0"
            )
    if cfg.logit_scale and "logit_scale" not in paths:
        raise UserError(
            "config.lock.logit_scale = True, but a model without a text tower has no logit scale; "
            "set it to False"
        )
    if cfg.logit_scale:
        frozen |= {p for p in paths if p in ("logit_scale", "logit_bias")}
    for pattern in cfg.patterns:
        compiled = compile_pattern(pattern, "config.lock.patterns")
        matching = {p for p in paths if compiled.fullmatch(p)}
        if not matching:
            raise UserError(
                f"config.lock.patterns has {pattern!r}, which matches no parameter; correct or "
                f"remove it; a path looks like {paths[0]!r}"
            )
        frozen |= matching
    return {p: p in frozen for p in paths}


def _frozen_tower_paths(paths: Sequence[str], modality: str, num_unlocked: int) -> set[str]:
    """Return the paths of a locked tower before its last `num_unlocked` layers (0: all paths)."""
    in_tower = tower_paths(paths, modality)
    if not in_tower:
        raise UserError(
            f"config.lock.{modality} = True, but the model has no {modality} tower; set it to False"
        )
    count = num_layers(in_tower)
    if num_unlocked and not 0 < num_unlocked <= count:
        raise UserError(
            f"config.lock.{modality}_unlocked_layers = {num_unlocked}; expected 0 to "
            f"{count}, since the tower has {count} layers"
        )
    last = count - num_unlocked if num_unlocked else count + 1
    return {f"{modality}/{p}" for p, depth in layer_depths(in_tower).items() if depth <= last}


def _is_statistic(path: str) -> bool:
    """Whether a path is an input statistic of a head, such as 'image_head/input_mean'."""
    component, _, path_in_head = path.partition("/")
    is_head = component in {f"{modality}_head" for modality in MODALITIES}
    return is_head and path_in_head.rpartition("/")[2] in STATISTICS
