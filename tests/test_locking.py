"""Locking: the frozen parameters of a config, and the frozen prefix of a tower."""

import pytest

from imgtune_jax import config, locking
from imgtune_jax.locking import FrozenPrefix

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
TEXT_PATHS = ["embed/embedding", "blocks_0/fc1/kernel", "blocks_1/fc1/kernel", "final_norm/scale"]


def lock_config(**changes):
    fields = dict(
        image=False, image_head=False, image_unlocked_layers=0, text=False, text_head=False,
        text_unlocked_layers=0, logit_scale=False, patterns=(),
    )  # fmt: skip
    return config.LockConfig(**{**fields, **changes})


def frozen(paths=PATHS, **changes):
    """Return the set of paths that a lock config with changes freezes."""
    return {p for p, is_frozen in locking.frozen_paths(lock_config(**changes), paths).items()
            if is_frozen}  # fmt: skip


def prefix(*frozen_paths):
    """Return the frozen prefix of a text tower with two layers, given its frozen paths."""
    return FrozenPrefix.from_paths({path: path in frozen_paths for path in TEXT_PATHS})


def test_no_parameter_is_frozen_by_default():
    assert not frozen()


def test_locking_a_tower_does_not_freeze_its_head():
    assert frozen(image=True) == {p for p in PATHS if p.startswith("image/")}
    assert frozen(image_head=True) == {"image_head/kernel"}
    assert frozen(text=True) == {p for p in PATHS if p.startswith("text/")}


def test_unlocked_layers_and_the_modules_after_them_train():
    image_paths = {p for p in PATHS if p.startswith("image/")}
    assert image_paths - frozen(image=True, image_unlocked_layers=2) == {
        "image/blocks_10/fc1/kernel",  # layers are sorted by number, not as strings
        "image/blocks_11/fc1/kernel",
        "image/final_norm/scale",
    }


def test_patterns_match_the_full_path():
    assert frozen(patterns=(r"text/embed/.*",)) == {"text/embed/embedding"}


def test_head_statistics_are_always_frozen():
    statistics = ["image_head/input_mean", "image_head/input_std"]
    assert frozen(paths=[*PATHS, *statistics, "image/input_mean"]) == set(statistics)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(patterns=("nothing/.*",)), "matches no parameter"),
        (dict(image_unlocked_layers=1), "needs config.lock.image = True"),
        (dict(image=True, image_unlocked_layers=13), "expected 0 to 12"),
    ],
)
def test_setting_that_does_not_fit_the_parameters_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        frozen(**changes)


def test_prefix_is_the_contiguous_run_of_frozen_layers_from_the_input():
    embed, first, second, norm = TEXT_PATHS
    assert prefix() is None
    assert prefix(first, second) is None  # the embeddings train
    assert prefix(embed) is None  # no frozen layer
    assert prefix(embed, second, norm) is None
    assert prefix(embed, first, norm) == FrozenPrefix(1)
    assert prefix(embed, first, second) == FrozenPrefix(2)
    assert prefix(*TEXT_PATHS) == FrozenPrefix(-1)
    assert prefix(*TEXT_PATHS).is_full_tower


@pytest.mark.parametrize(
    ("num_layers", "contained"), [(1, TEXT_PATHS[:2]), (2, TEXT_PATHS[:3]), (-1, TEXT_PATHS)]
)
def test_prefix_contains_embeddings_and_its_first_layers(num_layers, contained):
    assert [p for p in TEXT_PATHS if FrozenPrefix(num_layers).contains(p)] == contained


def test_layers_are_parsed_from_paths():
    assert locking.layer_index("blocks_12/attn/q/kernel") == 12
    assert locking.layer_index("final_norm/scale") is None
    assert locking.num_layers(locking.tower_paths(PATHS, "image")) == 12
    assert locking.num_layers(["embed/embedding"]) == 0
    assert locking.is_embedding("pos_embed") and not locking.is_embedding("final_norm/scale")


def test_layers_of_a_resnet_are_its_blocks_in_order():
    paths = ["stem/kernel", *[f"stage{s}_{i}/conv1/kernel" for s in (1, 2) for i in range(11)]]
    assert locking.num_layers(paths) == 22
    assert locking.layer_depths(paths) == {path: depth for depth, path in enumerate(paths)}
    image = [f"image/{path}" for path in paths]
    unlocked = set(image) - frozen(paths=image, image=True, image_unlocked_layers=2)
    assert unlocked == {"image/stage2_9/conv1/kernel", "image/stage2_10/conv1/kernel"}
