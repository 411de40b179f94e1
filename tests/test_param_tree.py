"""Functions on parameter trees by path: flatten, split, merge, select, map, match, digest."""

import jax
import numpy as np
import pytest

from imgtune_jax import param_tree

TREE = {
    "image": {"a": np.ones(2, np.float32), "b": {"c": np.zeros(3, np.float32)}},
    "logit_scale": np.float32(1.0),
}
PATHS = ["image/a", "image/b/c", "logit_scale"]


def test_unflatten_undoes_flatten():
    flat = param_tree.flatten(TREE)
    assert sorted(flat) == PATHS and flat["image/b/c"] is TREE["image"]["b"]["c"]
    jax.tree.map(np.testing.assert_array_equal, param_tree.unflatten(flat), TREE)


def test_paths_of_concrete_and_abstract_trees_are_sorted():
    abstract = jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, TREE))
    assert param_tree.param_paths(TREE) == param_tree.param_paths(abstract) == PATHS


def test_path_str_equals_the_path_of_flatten():
    key_paths, _ = jax.tree_util.tree_flatten_with_path(TREE)
    assert [param_tree.path_str(path) for path, _ in key_paths] == PATHS


def test_path_str_names_attributes_and_indices():
    path = (
        jax.tree_util.GetAttrKey("mu"),
        jax.tree_util.SequenceKey(0),
        jax.tree_util.DictKey("kernel"),
    )
    assert param_tree.path_str(path) == "mu/0/kernel"


def test_merge_undoes_split():
    is_frozen = {"image/a": True, "image/b/c": False, "logit_scale": False}
    trainable, frozen = param_tree.split(TREE, is_frozen)
    assert frozen == {"image": {"a": TREE["image"]["a"]}}
    merged = param_tree.merge(trainable, frozen)
    assert param_tree.param_paths(merged) == PATHS
    assert merged["image"]["b"]["c"] is TREE["image"]["b"]["c"]


def test_split_of_a_tree_with_an_unknown_path_is_an_error():
    with pytest.raises(KeyError, match="image/b/c"):
        param_tree.split(TREE, {"image/a": True, "logit_scale": False})


def test_select_keeps_leaves_and_drops_empty_groups():
    selected = param_tree.select(TREE, lambda path: path.startswith("image/b"))
    assert param_tree.param_paths(selected) == ["image/b/c"]
    assert param_tree.select(TREE, lambda path: False) == {}


def test_map_with_path_has_the_structure_of_the_tree():
    shapes = param_tree.map_with_path(lambda path, x: (path, x.shape), TREE)
    assert shapes == {
        "image": {"a": ("image/a", (2,)), "b": {"c": ("image/b/c", (3,))}},
        "logit_scale": ("logit_scale", ()),
    }


def test_first_matching_rule_wins():
    values = param_tree.match_rules([("image/.*", 0.1), (".*", 1.0)], PATHS, "multipliers")
    assert values == {"image/a": 0.1, "image/b/c": 0.1, "logit_scale": 1.0}


def test_path_that_no_rule_matches_is_an_error():
    with pytest.raises(ValueError, match=r"multipliers: .*\n.*no rule matches \['logit_scale'\]"):
        param_tree.match_rules([("image/.*", 0.1)], PATHS, "multipliers")


def test_rule_that_matches_no_path_is_an_error_except_for_the_default_rule():
    with pytest.raises(ValueError, match=r"match no parameter: \['imgae/\.\*'\]"):
        param_tree.match_rules([("imgae/.*", 0.1), (".*", 1.0)], PATHS, "multipliers")
    rules = [("image/.*", 0.1), ("logit_scale", 0.2), (".*", 1.0)]
    assert param_tree.match_rules(rules, PATHS, "multipliers")["logit_scale"] == 0.2


@pytest.mark.parametrize(
    "changed",
    [
        {"image": TREE["image"]},
        TREE | {"logit_scale": np.float32(2.0)},
        TREE | {"logit_scale": np.float64(1.0)},
        TREE | {"logit_scale": np.ones(1, np.float32)},
        {"image": TREE["image"], "scale": TREE["logit_scale"]},
    ],
    ids=["missing", "value", "dtype", "shape", "path"],
)
def test_digest_depends_on_paths_shapes_dtypes_and_values(changed):
    assert param_tree.params_digest(changed) != param_tree.params_digest(TREE)


def test_digest_does_not_depend_on_order_or_device():
    reordered = dict(reversed(jax.tree.map(jax.device_put, TREE).items()))
    assert param_tree.params_digest(reordered) == param_tree.params_digest(TREE)
