"""A ConfigDict in, validated frozen dataclasses out. The only file that reads a ConfigDict.

The dataclasses say what a key means and which type it has; `configs/base.py` holds every default.
What a component takes (a tower, a source, a loss) is checked by the component itself, so those
parts stay plain dicts here.
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
from typing import Any, TypeVar

from ml_collections import ConfigDict

from imgtune_jax import config_history

T = TypeVar("T")
ComponentConfig = dict[str, Any]  # {"name": which, **fields}


@dataclass(frozen=True)
class Duration:
    """A length of training. At most one of the three is set; none set means never."""

    steps: int | None
    epochs: float | None
    examples: int | None

    def in_steps(self, *, batch_size: int, num_examples: int) -> int | None:
        """Steps, rounded to nearest and at least 1; None when the duration is unset."""
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return max(1, round(self.epochs * num_examples / batch_size))
        if self.examples is not None:
            return max(1, round(self.examples / batch_size))
        return None


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1, which takes what is left."""

    data: int
    fsdp: int
    tensor: int


@dataclass(frozen=True)
class WeightsConfig:
    """A tower's pretrained weights: {} = random, else {"format", and "package" or "path"}."""

    image: dict[str, Any]
    text: dict[str, Any]


@dataclass(frozen=True)
class LockConfig:
    """What does not train. `*_unlocked_layers = n` frees the last n layers of a locked tower and
    all that follows them. `patterns` are further regular expressions on parameter paths, matched
    in full (`image/blocks_0/.*`), that lock whatever they match."""

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
    """Training data. `captions` weighs the caption sets of a record, `prefixes` says what stands
    before a set's captions and carries no loss ("<de>"); `transforms` augment.

    `length_buckets`: a batch's texts are padded to the least of these lengths that holds all of
    them, or else to the tokenizer's. A step is compiled for each, and padding changes no value."""

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
    """What locked towers give, computed once: `*_views` seeded augmentations of an image, or
    captions drawn of a record. 0 views: that tower is run at every step.

    `path` is a folder that runs may share, "auto" for the user's cache folder, None for no cache.
    A tower is cached from its input to its first layer that trains; one that trains from its input
    on is run at every step. `dtype` is float32, bfloat16 or int8 (one scale a vector).
    """

    path: str | None
    dtype: str
    image_views: int
    text_views: int


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule. Multipliers are (regex on the parameter path, factor): the first
    match wins and every parameter must match one."""

    name: str
    args: dict[str, Any]
    lr: float
    schedule: str
    warmup: Duration
    cooldown: Duration
    weight_decay: float
    clip_norm: float | None
    layer_decay: float
    lr_multipliers: tuple[tuple[str, float], ...]
    weight_decay_multipliers: tuple[tuple[str, float], ...]
    ema_decay: float | None


@dataclass(frozen=True)
class CheckpointConfig:
    """How often to save and what to keep. `best_metric` is a name as evaluators report it."""

    every: Duration
    keep_last: int
    keep_best: int
    best_metric: str | None


@dataclass(frozen=True)
class Config:
    """One experiment.

    `preprocess` is what every image goes through when the model is judged or used. `evals` are run
    every `eval_every` and at the end; `baselines` once, on the model before its first step.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, ready for JSON; `parse` reads them back to an equal Config."""
        return dataclasses.asdict(self)


def parse_config(config: Any) -> Config:
    """Validate a ConfigDict, or the dict that `Config.to_dict` gave.

    Raises ValueError naming every wrong key at once: unknown (with the nearest known one),
    missing, or of another type than wanted.
    """
    tree = _to_builtins(config)
    errors = list(config_history.rename_errors(tree)) if isinstance(tree, Mapping) else []
    parsed: Any = None if errors else _parse(Config, config, "config", errors)
    if not errors:
        errors = list(_value_errors(parsed))
    if errors:
        raise ValueError("config is not valid:\n  " + "\n  ".join(errors))
    return parsed


def _parse(kind: Any, value: Any, path: str, errors: list[str]) -> Any:
    if isinstance(value, ConfigDict):  # one inside a tuple stays one in ConfigDict.to_dict
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
        each = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(each) == len(value):
            pairs = enumerate(zip(each, value, strict=True))
            return tuple(_parse(a, v, f"{path}[{i}]", errors) for i, (a, v) in pairs)
    if kind is Any:
        return _to_builtins(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = kind in (bool, int, float, str) and isinstance(value, kind)
    if plain and not (isinstance(value, bool) and kind is not bool):
        return value
    wanted = str(kind) if origin else getattr(kind, "__name__", str(kind))
    errors.append(f"{path} = {value!r} ({type(value).__name__}); wanted {wanted}")
    return None


def _parse_fields(kind: Any, value: Any, path: str, errors: list[str]) -> Any:
    if not isinstance(value, Mapping):
        errors.append(f"{path} = {value!r}; wanted a group with keys {_names(kind)}")
        return None
    hints = typing.get_type_hints(kind)
    for key in value:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {_names(kind)}"
            errors.append(f"{path}.{key} is unknown; {hint}")
    missing = [name for name in hints if name not in value]
    errors.extend(f"{path}.{name} is missing" for name in missing)
    present = {n: h for n, h in hints.items() if n in value}
    fields = {n: _parse(h, value[n], f"{path}.{n}", errors) for n, h in present.items()}
    return None if missing else kind(**fields)


def _names(kind: Any) -> str:
    return ", ".join(f.name for f in dataclasses.fields(kind))


def _to_builtins(value: Any) -> Any:
    """Nested mappings to dicts and lists to tuples, so that equal configs compare equal."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {k: _to_builtins(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_to_builtins(v) for v in value)
    return value


def _value_errors(c: Config) -> Iterable[str]:
    durations = {
        "total": c.total,
        "eval_every": c.eval_every,
        "checkpoint.every": c.checkpoint.every,
        "optim.warmup": c.optim.warmup,
        "optim.cooldown": c.optim.cooldown,
    }
    for name, d in durations.items():
        chosen = {k: v for k, v in dataclasses.asdict(d).items() if v is not None}
        if len(chosen) > 1:
            yield f"config.{name} has {chosen}; set one of steps, epochs, examples, the others None"
        if any(v < 0 for v in chosen.values()):
            yield f"config.{name} has {chosen}; a duration is not negative"
    if all(v is None for v in dataclasses.asdict(c.total).values()):
        yield "config.total has no length; set one of steps, epochs, examples"
    if c.batch_size < 1 or c.accumulation < 1 or c.batch_size % c.accumulation:
        yield (
            f"config.batch_size = {c.batch_size} does not divide into config.accumulation = "
            f"{c.accumulation} microbatches"
        )
    if not c.objectives:
        yield "config.objectives is empty; name at least one, e.g. dict(softmax=dict(weight=1.0))"
    if min(c.cache.image_views, c.cache.text_views) < 0:
        yield f"config.cache has {dataclasses.asdict(c.cache)}; views are not negative"


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (value in a, value in b)} of all leaves that differ."""
    flat_a, flat_b = flatten_config(a.to_dict()), flatten_config(b.to_dict())
    keys = sorted(flat_a.keys() | flat_b.keys())
    return {
        k: (flat_a.get(k), flat_b.get(k))
        for k in keys
        if k not in flat_a or k not in flat_b or flat_a[k] != flat_b[k]
    }


def flatten_config(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; empty groups stay, as {}."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flatten_config(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved config as JSON."""
    Path(path).write_text(json.dumps(config.to_dict(), indent=1) + "\n")


def load_config(path: str | Path) -> Config:
    """Read what `save` wrote, today or before. Raises FileNotFoundError with what is wanted."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no config at {path}; wanted a run's folder, as train.py writes it"
        )
    saved = json.loads(path.read_text())
    config_history.upgrade(saved)
    return parse_config(saved)
