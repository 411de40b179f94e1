"""Locking: which parameters a config freezes, and each tower's frozen prefix.

`config.lock` determines the frozen parameters by path. If a tower is frozen from its input on,
without an interruption, that part is its *frozen prefix*: a function of the input alone, so its
output can be cached. What follows is the *suffix*. No other module parses layer names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from imgtune_jax.config import LockConfig
from imgtune_jax.types import MODALITIES

# Modules that come after the layers, in every tower. All others outside the layers come before.
AFTER_LAYERS = ("final_norm", "pool", "head", "classifier", "vocabulary")

# Statistics of a standardizing head are measured (`train/calibrate.py`), never trained.
STATISTICS = ("input_mean", "input_std")


@dataclass(frozen=True)
class FrozenPrefix:
    """The part of a tower that is frozen from its input on.

    `num_layers` n is the embeddings and the first n layers; -1 is the full tower.
    """

    num_layers: int

    @classmethod
    def from_paths(cls, is_frozen: Mapping[str, bool]) -> FrozenPrefix | None:
        """The prefix of a tower, or None if the tower trains from its input on.

        `is_frozen` maps each path in the tower, such as 'blocks_0/attn/q/kernel', to whether it is
        frozen.
        """
        if all(is_frozen.values()):
            return cls(-1)
        modules: dict[str, bool] = {}
        for path, frozen in is_frozen.items():
            name = path.partition("/")[0]
            modules[name] = modules.get(name, True) and frozen
        if not all(frozen for name, frozen in modules.items() if is_embedding(name)):
            return None
        n = 0
        while modules.get(f"blocks_{n}", False):
            n += 1
        return cls(n) if n else None

    @property
    def is_full_tower(self) -> bool:
        """Whether nothing of the tower trains."""
        return self.num_layers == -1

    def contains(self, path: str) -> bool:
        """Whether a path in the tower belongs to the prefix."""
        layer = layer_index(path)
        if self.is_full_tower:
            return True
        return is_embedding(path) if layer is None else layer < self.num_layers


def layer_index(path: str) -> int | None:
    """The number in 'blocks_3/…', a path in a tower; None for a parameter outside the layers."""
    match = re.match(r"blocks_(\d+)(?:/|$)", path)
    return int(match.group(1)) if match else None


def num_layers(paths: Iterable[str]) -> int:
    """Number of layers of a tower with these paths."""
    layers = [layer for layer in map(layer_index, paths) if layer is not None]
    return max(layers) + 1 if layers else 0


def is_embedding(path: str) -> bool:
    """Whether a path in a tower belongs to a module before the layers."""
    return layer_index(path) is None and path.partition("/")[0] not in AFTER_LAYERS


def frozen_paths(cfg: LockConfig, paths: Sequence[str]) -> dict[str, bool]:
    """{path: whether it is frozen} of all parameters.

    Raises ValueError for a setting that does not fit the parameters.
    """
    frozen = {p for p in paths if _is_statistic(p)}
    for modality in MODALITIES:
        if getattr(cfg, f"{modality}_head"):
            frozen |= {p for p in paths if p.startswith(f"{modality}_head/")}
        num_unlocked = getattr(cfg, f"{modality}_unlocked_layers")
        if getattr(cfg, modality):
            frozen |= _frozen_tower_paths(paths, modality, num_unlocked)
        elif num_unlocked:
            raise ValueError(
                f"config.lock.{modality}_unlocked_layers = {num_unlocked} needs "
                f"config.lock.{modality} = True"
            )
    if cfg.logit_scale:
        frozen |= {p for p in paths if p in ("logit_scale", "logit_bias")}
    for pattern in cfg.patterns:
        hits = {p for p in paths if re.fullmatch(pattern, p)}
        if not hits:
            raise ValueError(
                f"config.lock.patterns: {pattern!r} matches no parameter; "
                f"a path looks like {paths[0]!r}"
            )
        frozen |= hits
    return {p: p in frozen for p in paths}


def _frozen_tower_paths(paths: Sequence[str], modality: str, num_unlocked: int) -> set[str]:
    """The paths of a locked tower, without its last layers and the modules after them."""
    tower = [p.removeprefix(f"{modality}/") for p in paths if p.startswith(f"{modality}/")]
    count = num_layers(tower)
    if num_unlocked and not 0 < num_unlocked <= count:
        raise ValueError(
            f"config.lock.{modality}_unlocked_layers = {num_unlocked}; the tower has {count} "
            f"layers, so 0 to {count} can be unlocked"
        )
    prefix = FrozenPrefix(count - num_unlocked if num_unlocked else -1)
    return {f"{modality}/{p}" for p in tower if prefix.contains(p)}


def _is_statistic(path: str) -> bool:
    component, _, rest = path.partition("/")
    return component in ("image_head", "text_head") and rest.rpartition("/")[2] in STATISTICS
