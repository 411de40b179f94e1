"""Config keys that were added, renamed or removed, so that the configs of older runs still load.

`upgrade` translates a saved config. In a user's config, an old key or value is an error that names
the new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

# Keys added later, with the value that older runs implicitly used: (group, key, value). The group
# "" is the whole config.
ADDED_KEYS = (
    ("data", "prefixes", {}),
    ("data", "length_buckets", ()),
    ("optim", "warmup_from_zero", False),
    ("optim", "timescale", {"steps": None, "epochs": None, "examples": None}),
    ("optim", "weight_decay_scaled_by", "learning_rate"),
    ("checkpoint", "best_mode", None),
    ("", "wandb_project", None),
)

# Arguments of optimizers by name, with the values that runs implicitly used if their config lacks
# `optim.weight_decay_scaled_by`. Their default values differ since that key was added.
OLD_OPTIMIZER_ARGS: dict[str, dict[str, Any]] = {
    "adafactor": {"beta2_cap": None, "clipping_threshold": 1.0},
    "muon": {"adam_paths": ()},
}

# In the paths below, `*` stands for any key: here, the user's name for an evaluator.
_EVALUATORS = ("evals.*", "baselines.*")

# Renamed keys: (path of the old key, new key).
RENAMED_KEYS = (
    ("data.captions", "caption_weights"),
    ("data.min_records", "max_bad_fraction_after"),
    ("model.decoder.reads", "input_from"),
    *((f"{evaluator}.normalise", "normalize_length") for evaluator in _EVALUATORS),
    *((f"{evaluator}.decoding.max_length", "max_new_tokens") for evaluator in _EVALUATORS),
    *((f"{evaluator}.decoding.min_length", "min_new_tokens") for evaluator in _EVALUATORS),
    *(
        (f"{evaluator}.decoding.no_repeat_ngram", "no_repeat_ngram_size")
        for evaluator in _EVALUATORS
    ),
)
# Renamed values: (path of the key, old value, new value).
RENAMED_VALUES = (
    ("model.decoder.input_from", "tokens", "text_tower"),
    *((f"{evaluator}.name", "answers", "scoring_classifier") for evaluator in _EVALUATORS),
)
# Removed keys, on which no result depended: (path, reason of the removal).
REMOVED_KEYS = (("model.image.depthwise", "the backend determines the form of the convolution"),)


class _Match(NamedTuple):
    """A key that matches a path, its dotted name, and the group that contains it."""

    dotted: str
    group: dict[str, Any]
    key: str


def _matches(tree: Mapping[str, Any], path: str) -> Iterator[_Match]:
    """Yield every key of `tree` that matches `path`."""
    groups: list[tuple[str, Any]] = [("", tree)]
    *parents, key = path.split(".")
    for parent in parents:
        groups = [
            (f"{prefix}{name}.", value)
            for prefix, group in groups
            for name, value in group.items()
            if parent in ("*", name) and isinstance(value, Mapping)
        ]
    yield from (_Match(prefix + key, group, key) for prefix, group in groups if key in group)


def rename_errors(tree: Mapping[str, Any]) -> Iterable[str]:
    """Yield an error for each key or value of a user's config that was renamed or removed."""
    for path, new_key in RENAMED_KEYS:
        for match in _matches(tree, path):
            new = match.dotted.removesuffix(match.key) + new_key
            yield f"config.{match.dotted} is now called config.{new}; rename it"
    for path, old_value, new_value in RENAMED_VALUES:
        for match in _matches(tree, path):
            if match.group[match.key] == old_value:
                yield (
                    f"config.{match.dotted} = {old_value!r} is now called {new_value!r}; rename it"
                )
    for path, reason in REMOVED_KEYS:
        for match in _matches(tree, path):
            yield f"config.{match.dotted} no longer exists, since {reason}; remove it"


def upgrade(tree: dict[str, Any]) -> None:
    """Translate a saved config to the current keys and values, in place."""
    optim = tree.get("optim", {})
    if optim and "weight_decay_scaled_by" not in optim:
        _keep_old_optimizer(optim)
    for group, key, value in ADDED_KEYS:
        parent = tree.get(group, {}) if group else tree
        parent.setdefault(key, value)
    for path, new_key in RENAMED_KEYS:
        for match in _matches(tree, path):
            match.group[new_key] = match.group.pop(match.key)
    for path, old_value, new_value in RENAMED_VALUES:
        for match in _matches(tree, path):
            if match.group[match.key] == old_value:
                match.group[match.key] = new_value
    for path, _ in REMOVED_KEYS:
        for match in _matches(tree, path):
            del match.group[match.key]


def _keep_old_optimizer(optim: dict[str, Any]) -> None:
    """Set what the optimizer of a run of before `optim.weight_decay_scaled_by` used, in place."""
    optim["args"] = OLD_OPTIMIZER_ARGS.get(optim["name"], {}) | optim["args"]
    if optim["schedule"] in ("cosine", "linear"):  # they had no cool-down
        optim["cooldown"] = {unit: x and 0 for unit, x in optim["cooldown"].items()}
    if optim["schedule"] == "rsqrt" and not any(optim["warmup"].values()):
        optim["timescale"] = {"steps": 1, "epochs": None, "examples": None}
