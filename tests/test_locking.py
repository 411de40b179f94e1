"""Locking by regex: exactly what the config says, said explicitly."""

import numpy as np
import pytest

from imgtune_jax import config, locking, param_tree

PATHS = [
    "image/patch_embed/kernel",
    "image/pos_embed",
    *[f"image/blocks_{i}/fc1/kernel" for i in range(12)],
    "image/final_norm/scale",
    "image_head/kernel",
    "logit_scale",
    "text/blocks_0/fc1/kernel",
    "text/blocks_1/fc1/kernel",
    "text/embed/embedding",
    "text_head/kernel",
]


def rules(**changes):
    fields = dict(
        image=False, image_head=False, image_unlocked_layers=0, text=False, text_head=False,
        text_unlocked_layers=0, logit_scale=False, patterns=(),
    )  # fmt: skip
    return config.LockConfig(**{**fields, **changes})


def locked(**changes):
    return {p for p, frozen in locking.frozen_paths(rules(**changes), PATHS).items() if frozen}


def test_nothing_is_locked_by_default():
    assert not locked()


def test_locking_a_tower_leaves_its_head_free():
    assert locked(image=True) == {p for p in PATHS if p.startswith("image/")}
    assert locked(image_head=True) == {"image_head/kernel"}
    assert locked(text=True) == {p for p in PATHS if p.startswith("text/")}


def test_the_last_layers_and_what_follows_them_can_be_free():
    free = {p for p in PATHS if p.startswith("image/")} - locked(
        image=True, image_unlocked_layers=2
    )
    assert free == {
        "image/blocks_10/fc1/kernel",  # by number, not by spelling: 10 and 11 are the last two
        "image/blocks_11/fc1/kernel",
        "image/final_norm/scale",
    }


def test_patterns_lock_what_they_match_in_full():
    assert locked(patterns=(r"text/embed/.*",)) == {"text/embed/embedding"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(patterns=("nothing/.*",)), "matches no parameter"),
        (dict(image_unlocked_layers=1), "needs config.lock.image = True"),
        (dict(image=True, image_unlocked_layers=13), "has 12 layers"),
    ],
)
def test_a_rule_that_does_not_fit_is_an_error(changes, says):
    with pytest.raises(ValueError, match=says):
        locked(**changes)


def test_first_match_wins_and_every_parameter_must_match():
    found = param_tree.match_rules([("image/.*", 0.1), (".*", 1.0)], PATHS, "multipliers")
    assert found["image/pos_embed"] == 0.1 and found["logit_scale"] == 1.0
    with pytest.raises(ValueError, match="no rule matches"):
        param_tree.match_rules([("image/.*", 0.1)], PATHS, "multipliers")
    with pytest.raises(ValueError, match=r"match no parameter: \['imgae/\.\*'\]"):
        param_tree.match_rules([("imgae/.*", 0.1), (".*", 1.0)], PATHS, "multipliers")


def test_merge_undoes_split():
    tree = {"image": {"a": np.ones(2), "b": np.zeros(3)}, "logit_scale": np.ones(())}
    is_frozen = {"image/a": True, "image/b": False, "logit_scale": False}
    trainable, frozen = param_tree.split(tree, is_frozen)
    assert frozen == {"image": {"a": tree["image"]["a"]}}
    merged = param_tree.merge(trainable, frozen)
    assert merged["image"].keys() == {"a", "b"} and merged["image"]["b"] is tree["image"]["b"]
