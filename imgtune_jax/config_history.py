"""Config keys that were added, renamed or removed, so that saved runs still load.

`upgrade` translates a saved config. In a user's config an old name is an error that gives the new
one, so that no config means something else than it says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Keys added later, with the value that older runs implicitly used.
ADDED_KEYS = (("data", "prefixes", {}), ("data", "length_buckets", ()))

# Renamed keys: (path of the old key, new key). `*` stands for any one key.
RENAMED_KEYS = (
    ("data.captions", "caption_weights"),
    ("data.min_records", "max_bad_fraction_after"),
    ("model.decoder.reads", "input_from"),
    ("evals.*.normalise", "normalize_length"),
    ("evals.*.decoding.max_length", "max_new_tokens"),
    ("evals.*.decoding.min_length", "min_new_tokens"),
    ("evals.*.decoding.no_repeat_ngram", "no_repeat_ngram_size"),
)
# Renamed values: (path of the key, old value, new value).
RENAMED_VALUES = (
    ("model.decoder.input_from", "tokens", "text_tower"),
    ("evals.*.name", "answers", "scoring_classifier"),
)
# Keys that no longer exist, with the reason. They changed no value.
REMOVED_KEYS = (("model.image.depthwise", "the backend determines the form of the convolution"),)


def _matches(tree: Any, path: str) -> list[tuple[str, dict[str, Any], str]]:
    """(dotted path, group, key) of every key in `tree` that matches `path`."""
    groups: list[tuple[str, Any]] = [("", tree)]
    *parents, leaf = path.split(".")
    for parent in parents:
        groups = [
            (f"{prefix}{key}.", value)
            for prefix, group in groups
            for key, value in group.items()
            if parent in ("*", key) and isinstance(value, Mapping)
        ]
    return [(prefix + leaf, group, leaf) for prefix, group in groups if leaf in group]


def rename_errors(tree: Mapping[str, Any]) -> Iterable[str]:
    """An error for each key or value of `tree` that has a new name."""
    for path, new in RENAMED_KEYS:
        for found, _, old in _matches(tree, path):
            yield f"config.{found} is now called {found.removesuffix(old)}{new}; rename it"
    for path, old, new in RENAMED_VALUES:
        for found, group, key in _matches(tree, path):
            if group[key] == old:
                yield f"config.{found} = {old!r} is now called {new!r}; rename it"
    for path, reason in REMOVED_KEYS:
        for found, _, _ in _matches(tree, path):
            yield f"config.{found} no longer exists: {reason}; remove it"


def upgrade(tree: dict[str, Any]) -> None:
    """Give a saved config today's keys and names, in place."""
    for group, key, value in ADDED_KEYS:
        tree.get(group, {}).setdefault(key, value)
    for path, new in RENAMED_KEYS:
        for _, group, old in _matches(tree, path):
            group[new] = group.pop(old)
    for path, old, new in RENAMED_VALUES:
        for _, group, key in _matches(tree, path):
            group[key] = new if group[key] == old else group[key]
    for path, _ in REMOVED_KEYS:
        for _, group, key in _matches(tree, path):
            del group[key]
