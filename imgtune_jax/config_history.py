"""Config keys that were added, renamed or removed, so that the configs of older runs still load.

`upgrade` translates a saved config. In a user's config, an old key or value is an error that names
the new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

# Keys added later, with the value that older runs implicitly used: (group, key, value).
ADDED_KEYS = (
    ("data", "prefixes", {}),
    ("data", "length_buckets", ()),
    ("checkpoint", "best_mode", None),
)

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
    for group, key, value in ADDED_KEYS:
        tree.get(group, {}).setdefault(key, value)
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
