"""Checks of the values in a config: the ranges of numbers, and contradictions.

A path in the tables of ranges, such as `model.image.depth`, may contain wildcards. An element of a
list has its index as the last part of its path. A number that no path matches must be finite.
"""

from __future__ import annotations

import fnmatch
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


def _each(prefixes: Iterable[str], *names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for prefix in prefixes for name in names)


_EVALUATORS = ("evals.*", "baselines.*")
_DECODING = _each(_EVALUATORS, "decoding")
_METHODS = _each(_DECODING, "method")
_PERIODS = ("total", "eval_every", "checkpoint.every")  # 0 would mean neither never nor always
_RAMPS = ("optim.warmup", "optim.cooldown")
_TRANSFORMS = ("preprocess.*", "data.transforms.*")

# Range -> paths. "[" and "]" include the limit, "(" and ")" exclude it.
INTEGERS: dict[str, tuple[str, ...]] = {
    "[1, inf)": (
        *("batch_size", "accumulation", "log_every", "checkpoint.keep_last", "tokenizer.length"),
        *_each(_PERIODS, "steps", "examples"),
        *("data.length_buckets.*", "model.embed_dim", "model.image_size"),
        *_each(("model.*",), "width", "depth", "mlp_dim", "num_heads", "patch_size", "image_size"),
        *_each(("model.*",), "vocab_size", "max_length", "chunk", "num_queries", "hidden_dim"),
        *_each(_EVALUATORS, "ks.*", "shots.*", "seeds", "limit", "max_captions", "batch_size"),
        *_each(_EVALUATORS, "chunk"),
        *_each(_METHODS, "n", "width", "top_k"),
        *_each(_DECODING, "max_new_tokens", "no_repeat_ngram_size"),
    ),
    "[0, inf)": (
        *("checkpoint.keep_best", "cache.image_views", "cache.text_views", "tokenizer.pad_id"),
        *_each(("data",), "num_threads", "num_workers", "prefetch", "max_bad_fraction_after"),
        *_each(_RAMPS, "steps", "examples"),
        *_each(("model.*",), "num_registers", "num_classes"),
        *_each(("lock",), "image_unlocked_layers", "text_unlocked_layers"),
        *_each(_DECODING, "min_new_tokens"),
    ),
    "[2, inf)": _each(_EVALUATORS, "num_classes"),
    "[0, 4294967295]": ("seed", *_each(_EVALUATORS, "seed")),
}
NUMBERS: dict[str, tuple[str, ...]] = {
    "(0, inf)": (
        *_each(_PERIODS, "epochs"),
        *("optim.clip_norm", "model.image_std.*", "model.*.norm_epsilon"),
        *_each(_EVALUATORS, "l2", "l2s.*", "lambdas.*"),
        *_each(_METHODS, "temperature"),
        *_each(_DECODING, "repetition_penalty"),
    ),
    "[0, inf)": (
        *_each(_RAMPS, "epochs"),
        *("optim.lr", "optim.weight_decay", "optim.*_multipliers.*.1"),
        *("data.caption_weights.*", "objectives.*.weight", "objectives.*.z_loss"),
    ),
    "(0, 1]": ("optim.layer_decay", *_each(_METHODS, "top_p")),
    "[0, 1)": (
        *("optim.ema_decay", "optim.args.b1", "optim.args.b2", "optim.args.beta"),
        *("model.*.dropout", "model.*.patch_dropout", "objectives.*.label_smoothing"),
    ),
    "[0, 1]": ("data.max_bad_fraction", "model.*.parallel_fraction", *_each(_TRANSFORMS, "p")),
    "(0, 1)": _each(_EVALUATORS, "val_fraction"),
}


class _Row(NamedTuple):
    """A row of one of the tables."""

    kind: str
    interval: str
    paths: re.Pattern[str]

    def contains(self, value: Any) -> bool:
        """Whether a value is a number of the kind of this row and in its interval."""
        number_type = int if self.kind == "an integer" else int | float
        if isinstance(value, bool) or not isinstance(value, number_type):
            return False
        low, high = (float(limit) for limit in self.interval[1:-1].split(","))
        above = low <= value if self.interval[0] == "[" else low < value
        below = value <= high if self.interval[-1] == "]" else value < high
        return above and below  # both are False for NaN


@functools.cache
def _rows() -> tuple[_Row, ...]:
    return tuple(
        _Row(kind, interval, re.compile("|".join(map(fnmatch.translate, paths))))
        for kind, table in (("an integer", INTEGERS), ("a number", NUMBERS))
        for interval, paths in table.items()
    )


def value_errors(config: Mapping[str, Any]) -> Iterable[str]:
    """Yield an error for each value that is out of range or contradicts another.

    `config` is the result of `Config.to_dict`.
    """
    yield from _range_errors(config)
    durations = {"total": config["total"], "eval_every": config["eval_every"]}
    durations["checkpoint.every"] = config["checkpoint"]["every"]
    ramps = ("warmup", "cooldown", "timescale")
    durations |= {f"optim.{name}": config["optim"][name] for name in ramps}
    for name, duration in durations.items():
        lengths = {k: v for k, v in duration.items() if v is not None}
        if len(lengths) > 1:
            yield (
                f"config.{name} = {lengths}; expected one unit; set one of steps, epochs, "
                "examples, and the others to None"
            )
    if all(v is None for v in config["total"].values()):
        yield "config.total has no length; set one of steps, epochs, examples"
    batch_size, accumulation = config["batch_size"], config["accumulation"]
    if accumulation > 0 and batch_size % accumulation:
        yield (
            f"config.batch_size = {batch_size} does not divide into config.accumulation = "
            f"{accumulation} microbatches; set it to a multiple"
        )
    if (mode := config["checkpoint"]["best_mode"]) not in (None, "max", "min"):
        yield f"config.checkpoint.best_mode = {mode!r}; expected 'max', 'min' or None"
    if not config["objectives"]:
        yield "config.objectives is empty; name at least one, e.g. dict(softmax=dict(weight=1.0))"


def _range_errors(config: Mapping[str, Any]) -> Iterable[str]:
    """Yield an error for each value that is out of its range, of another kind, or not finite.

    None is in every range: it means that a setting is not used.
    """
    for path, value in _leaves(config, ""):
        if value is None:
            continue
        row = next((row for row in _rows() if row.paths.fullmatch(path)), None)
        if row is not None and not row.contains(value):
            yield f"config.{path} = {value!r}; expected {row.kind} in {row.interval}"
        elif row is None and isinstance(value, float) and not math.isfinite(value):
            yield f"config.{path} = {value!r}; expected a finite number"


def _leaves(tree: Any, path: str) -> Iterable[tuple[str, Any]]:
    """Yield (dotted path, value) of all values in nested mappings, lists and tuples."""
    if isinstance(tree, Mapping):
        items: Iterable[tuple[Any, Any]] = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        yield path, tree
        return
    for key, value in items:
        yield from _leaves(value, f"{path}.{key}" if path else str(key))
