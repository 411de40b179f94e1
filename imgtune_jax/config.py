"""Parse a ConfigDict into validated frozen dataclasses. No other file reads a ConfigDict.

The dataclasses define the meaning and the type of each key; `configs/base.py` has every default.
Settings of a component (a tower, a source, a loss) remain plain dicts. The component checks their
names, and `config_values.py` the ranges of their numbers.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from imgtune_jax import config_history, config_values
from imgtune_jax.errors import MissingFileError, UserError

ComponentConfig = dict[str, Any]  # {"name": key in a table of components, **fields}


@dataclass(frozen=True)
class Duration:
    """A length of training in one of three units. At most one is not None; all None means never."""

    steps: int | None
    epochs: float | None
    examples: int | None

    def in_steps(self, *, batch_size: int, num_examples: int) -> int | None:
        """Convert to steps, rounded to nearest; None if no unit is set.

        Only a length of 0 is 0 steps; any other is at least 1.
        """
        if self.steps is not None:
            return self.steps
        examples = self.examples
        if self.epochs is not None:
            examples = self.epochs * num_examples
        if not examples:
            return None if examples is None else 0
        return max(1, round(examples / batch_size))


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis. One axis may be -1, which means all remaining devices."""

    data: int
    fsdp: int
    tensor: int


@dataclass(frozen=True)
class WeightsConfig:
    """Pretrained weights by tower: {"format", and "package" or "path"}; {} means random weights.

    `ignore` may list fields in which the config is to differ from the files beside the weights.
    """

    image: dict[str, Any]
    text: dict[str, Any]


@dataclass(frozen=True)
class LockConfig:
    """Parameters that do not train.

    With `*_unlocked_layers = n`, the last n layers of a locked tower and every module after them
    train. `patterns` are regular expressions that match full parameter paths, such as
    `image/blocks_0/.*`; a path that one of them matches is locked too.
    """

    image: bool
    image_head: bool
    image_unlocked_layers: int
    text: bool
    text_head: bool
    text_unlocked_layers: int
    logit_scale: bool
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class DataConfig:
    """Training data.

    `caption_weights` maps each caption set of a record, such as one language, to its sampling
    weight. `prefixes` maps a caption set to a string that is put before its captions, such as
    "<de>"; its tokens have no loss. `transforms` augment images.

    `length_buckets`: the texts of a batch are padded to the smallest of these lengths that fits all
    of them, or to the tokenizer's length if none does. The step is compiled once per length. The
    choice of length changes no result.

    The run ends if more than the fraction `max_bad_fraction` of its records is unreadable. This is
    checked after the first `max_bad_fraction_after` records, or after the first epoch if it is
    shorter.
    """

    source: ComponentConfig
    caption_weights: dict[str, float]
    prefixes: dict[str, str]
    length_buckets: tuple[int, ...]
    transforms: tuple[ComponentConfig, ...]
    num_threads: int
    num_workers: int
    prefetch: int
    max_bad_fraction: float
    max_bad_fraction_after: int


@dataclass(frozen=True)
class CacheConfig:
    """Feature cache: the outputs of frozen prefixes, computed once per input.

    `image_views` augmentations of each image and `text_views` sampled captions of each record are
    cached. With 0 views, or without a frozen prefix, the full tower runs at every step.

    `path` is a folder that runs may share, "auto" for the user's cache folder, None for no cache.
    `dtype` is float32, bfloat16 or int8 (with one scale per vector).
    """

    path: str | None
    dtype: str
    image_views: int
    text_views: int


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule; `training/optim.py` and `training/schedules.py` define the keys.

    A multiplier is (regex of full parameter paths, factor). The first match of each path counts.
    """

    name: str
    args: dict[str, Any]
    lr: float
    schedule: str
    warmup: Duration
    warmup_from_zero: bool
    cooldown: Duration
    timescale: Duration
    weight_decay: float
    weight_decay_scaled_by: str
    clip_norm: float | None
    layer_decay: float
    lr_multipliers: tuple[tuple[str, float], ...]
    weight_decay_multipliers: tuple[tuple[str, float], ...]
    ema_decay: float | None


@dataclass(frozen=True)
class CheckpointConfig:
    """How often to save, and how many checkpoints to retain.

    With `best_metric`, such as "val/coco/image_to_text_R@1", every evaluated step is saved.
    `best_mode` is "max", "min" or None, which is "max" for recalls, accuracies and other scores.
    """

    every: Duration
    keep_last: int
    keep_best: int
    best_metric: str | None
    best_mode: str | None


@dataclass(frozen=True)
class Config:
    """One experiment.

    `preprocess` transforms every image in evaluation and inference, and in training if
    `data.transforms` is empty. `evals` run every `eval_every` and at the end; `baselines` run once,
    on the model before its first step.

    `wandb_project` is the project in Weights & Biases to log to, too; None means not to.
    """

    name: str
    seed: int
    mesh: MeshConfig
    model: dict[str, Any]
    weights: WeightsConfig
    lock: LockConfig
    objectives: dict[str, ComponentConfig]
    tokenizer: ComponentConfig
    preprocess: tuple[ComponentConfig, ...]
    data: DataConfig
    cache: CacheConfig
    batch_size: int
    accumulation: int
    total: Duration
    optim: OptimConfig
    checkpoint: CheckpointConfig
    eval_every: Duration
    evals: dict[str, ComponentConfig]
    baselines: dict[str, ComponentConfig]
    log_every: int
    wandb_project: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return nested dicts, ready for JSON, that `parse_config` parses to an equal Config."""
        return dataclasses.asdict(self)


def parse_config(config: Any) -> Config:
    """Parse and validate a ConfigDict, or the result of `Config.to_dict`.

    Checks in this order: no key was renamed or removed; no key is unknown, missing or of the wrong
    type; no value is out of range or contradicts another. Raises UserError listing all errors of
    the first check that fails.
    """
    parsed = _parse_config(config)
    _raise_errors(config_values.value_errors(parsed.to_dict()))
    return parsed


def _parse_config(config: Any) -> Config:
    """Parse a config without a check of its values."""
    tree = _to_builtins(config)
    errors = list(config_history.rename_errors(tree)) if isinstance(tree, Mapping) else []
    parsed: Any = None if errors else _parse(Config, config, "config", errors)
    _raise_errors(errors)
    return parsed


def _raise_errors(errors: Iterable[str]) -> None:
    if lines := list(errors):
        raise UserError("config is not valid:\n  " + "\n  ".join(lines))


def _parse(kind: Any, value: Any, path: str, errors: list[str]) -> Any:
    """Return `value` as the type `kind`; append to `errors` if it has another type."""
    if isinstance(value, ConfigDict):  # to_dict does not convert ConfigDicts inside a tuple
        value = value.to_dict()
    if dataclasses.is_dataclass(kind):
        return _parse_fields(kind, value, path, errors)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _parse(next(a for a in args if a is not type(None)), value, path, errors)
    if origin is dict and isinstance(value, Mapping):
        return {k: _parse(args[1], v, f"{path}.{k}", errors) for k, v in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            items = enumerate(zip(kinds, value, strict=True))
            return tuple(_parse(k, v, f"{path}[{i}]", errors) for i, (k, v) in items)
    if kind is Any:
        return _to_builtins(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    is_scalar = kind in (bool, int, float, str) and isinstance(value, kind)
    if is_scalar and not (isinstance(value, bool) and kind is not bool):
        return value
    expected = str(kind) if origin else getattr(kind, "__name__", str(kind))
    errors.append(f"{path} = {value!r} ({type(value).__name__}); expected {expected}")
    return None


def _parse_fields(kind: Any, value: Any, path: str, errors: list[str]) -> Any:
    """Return a mapping as the dataclass `kind`; append to `errors` if a key does not fit."""
    if not isinstance(value, Mapping) or not value:
        errors.append(f"{path} = {value!r}; expected a group with the keys {_names(kind)}")
        return None
    hints = typing.get_type_hints(kind)
    for key in value:
        if key not in hints:
            nearest = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {_names(kind)}"
            errors.append(f"{path}.{key} is unknown; {hint}")
    missing = [name for name in hints if name not in value]
    errors.extend(f"{path}.{name} is missing" for name in missing)
    present = {n: h for n, h in hints.items() if n in value}
    fields = {n: _parse(h, value[n], f"{path}.{n}", errors) for n, h in present.items()}
    return None if missing else kind(**fields)


def _names(kind: Any) -> str:
    """Return the field names of a dataclass, to list them in an error."""
    return ", ".join(f.name for f in dataclasses.fields(kind))


def _to_builtins(value: Any) -> Any:
    """Convert nested mappings to dicts and lists to tuples, so that equal configs compare equal."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {k: _to_builtins(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_to_builtins(v) for v in value)
    return value


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Return {dotted key: (value in a, value in b)} of all values that differ."""
    flat_a, flat_b = flatten_config(a.to_dict()), flatten_config(b.to_dict())
    keys = sorted(flat_a.keys() | flat_b.keys())
    return {
        k: (flat_a.get(k), flat_b.get(k))
        for k in keys
        if k not in flat_a or k not in flat_b or flat_a[k] != flat_b[k]
    }


def flatten_config(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten {"a": {"b": 1}} to {"a.b": 1}; an empty group becomes the value {}."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten_config(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def save_config(config: Config, path: str | Path) -> None:
    """Save the resolved config as JSON."""
    Path(path).write_text(json.dumps(config.to_dict(), indent=1) + "\n")


def load_config(path: str | Path) -> Config:
    """Load a config that this or an older version of `save_config` saved.

    Raises MissingFileError if there is no such file, and UserError if it is not a config.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"no config at {path}; expected the folder of a run of train.py")
    try:
        saved = dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a saved config: {error}; restore a backup") from error
    config_history.upgrade(saved)
    return _parse_config(saved)  # the version that saved it has checked its values
