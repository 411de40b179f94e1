from collections import Counter

import pytest

from imgtune_jax.data import Mixture, Subset, build_source
from imgtune_jax.errors import UserError
from tests.data.conftest import write_tar


def tar_config(folder, name, n):
    """Write a tar of n empty images, and return the config of its source."""
    path = write_tar(folder / f"{name}.tar", {f"{name}{i:03d}.png": b"" for i in range(n)})
    return {"name": "webdataset", "path": path}


@pytest.fixture
def configs(tmp_path):
    return [
        tar_config(tmp_path, "a", 10),
        tar_config(tmp_path, "b", 30),
        tar_config(tmp_path, "c", 7),
    ]


def build_mixture(configs, weights=None):
    return build_source({"name": "mixture", "sources": configs, "weights": weights})


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.5, 0.3, 0.2), (5, 1, 1), (1, 100, 1)])
def test_proportions_are_exact_up_to_one_record(configs, weights):
    mixture = build_mixture(configs, weights)
    counts = Counter(mixture.locate(i)[0] for i in range(len(mixture)))
    for k, weight in enumerate(weights):
        assert abs(counts[k] - len(mixture) * weight / sum(weights)) <= 1


@pytest.mark.parametrize("weights", [None, (1, 1, 1), (5, 1, 1), (1, 100, 1)])
def test_an_epoch_is_the_shortest_one_that_contains_every_record(configs, weights):
    mixture = build_mixture(configs, weights)
    occurrences = Counter(mixture.locate(i) for i in range(len(mixture)))
    assert set(occurrences) == {(k, i) for k, n in enumerate((10, 30, 7)) for i in range(n)}
    for k in range(3):  # a source repeats all of its records equally often, up to one
        counts = [c for (j, _), c in occurrences.items() if j == k]
        assert max(counts) - min(counts) <= 1
    assert any(mixture.counts[k] == n for k, n in enumerate((10, 30, 7)))


def test_without_weights_sources_are_concatenated(configs):
    mixture = build_mixture(configs)
    assert len(mixture) == 47
    assert mixture[10].key == "b.tar:b000.png" and mixture.read_metadata(46).key == "c.tar:c006.png"
    with pytest.raises(IndexError):
        mixture[47]


def test_mixtures_can_be_nested(configs):
    inner = {"name": "mixture", "sources": configs[:2], "weights": (1, 1)}
    outer = build_mixture([inner, configs[2]], (1, 1))
    assert len(outer) == 120 and outer.counts == (60, 60)


def test_fingerprint_depends_on_proportions(configs):
    assert build_mixture(configs).fingerprint == build_mixture(configs).fingerprint
    assert build_mixture(configs).fingerprint != build_mixture(configs, (1, 1, 1)).fingerprint


def test_invalid_weights_are_rejected(configs):
    with pytest.raises(ValueError, match="expected 3 weights above 0"):
        build_mixture(configs, (1, 1))
    with pytest.raises(ValueError, match="expected 3 weights above 0"):
        build_mixture(configs, (1, 0, 1))
    with pytest.raises(ValueError, match="has no sources"):
        Mixture(())


def test_class_names_are_those_of_the_sources_if_these_agree(configs):
    def names(*classes):
        sources = [
            c | {"classes": x, "label": ("l",)} for c, x in zip(configs, classes, strict=True)
        ]
        return Subset(build_mixture(sources), (0, 2)).class_names

    assert names(("a", "b"), None, ("a", "b", "c")) == ("a", "b", "c")
    assert names(None, None, None) == ()
    with pytest.raises(ValueError, match="equal labels mean different classes"):
        names(("a", "b"), None, ("b", "a"))


def test_sources_may_be_a_generator(configs):
    sources = [build_source(config) for config in configs]
    assert Mixture(source for source in sources) == Mixture(sources=tuple(sources))


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 0, -1])
def test_weights_that_are_no_proportion_are_rejected(configs, weight):
    with pytest.raises(UserError, match="expected 3 weights above 0 and finite"):
        build_source({"name": "mixture", "sources": configs, "weights": (1, 1, weight)})
