import io
import tarfile
from collections import Counter

import pytest

from imgtune_jax.data import Mixture, build_source


def tar(folder, name, n):
    path = folder / f"{name}.tar"
    with tarfile.open(path, "w") as out:
        for i in range(n):
            info = tarfile.TarInfo(f"{name}{i:03d}.png")
            out.addfile(info, io.BytesIO(b""))
    return {"name": "webdataset", "path": str(path)}


@pytest.fixture
def configs(tmp_path):
    return [tar(tmp_path, "a", 10), tar(tmp_path, "b", 30), tar(tmp_path, "c", 7)]


def mix(configs, weights=None):
    return build_source({"name": "mixture", "sources": configs, "weights": weights})


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.5, 0.3, 0.2), (5, 1, 1), (1, 100, 1)])
def test_proportions_are_exact(configs, weights):
    mixture = mix(configs, weights)
    seen = Counter(mixture.locate(i)[0] for i in range(len(mixture)))
    for k, weight in enumerate(weights):
        assert abs(seen[k] - len(mixture) * weight / sum(weights)) <= 1


@pytest.mark.parametrize("weights", [None, (1, 1, 1), (5, 1, 1), (1, 100, 1)])
def test_an_epoch_is_the_shortest_that_shows_every_record(configs, weights):
    mixture = mix(configs, weights)
    shown = Counter(mixture.locate(i) for i in range(len(mixture)))
    assert set(shown) == {(k, i) for k, n in enumerate((10, 30, 7)) for i in range(n)}
    for k in range(3):  # a source repeats evenly
        times = [c for (j, _), c in shown.items() if j == k]
        assert max(times) - min(times) <= 1
    assert any(mixture.counts[k] == n for k, n in enumerate((10, 30, 7)))


def test_without_weights_sources_are_joined(configs):
    mixture = mix(configs)
    assert len(mixture) == 47
    assert mixture[10].key == "b.tar:b000.png" and mixture.read_metadata(46).key == "c.tar:c006.png"
    with pytest.raises(IndexError):
        mixture[47]


def test_mixtures_nest(configs):
    inner = {"name": "mixture", "sources": configs[:2], "weights": (1, 1)}
    outer = mix([inner, configs[2]], (1, 1))
    assert len(outer) == 120 and outer.counts == (60, 60)


def test_fingerprint_follows_proportions(configs):
    assert mix(configs).fingerprint == mix(configs).fingerprint
    assert mix(configs).fingerprint != mix(configs, (1, 1, 1)).fingerprint


def test_wrong_weights_are_refused(configs):
    with pytest.raises(ValueError, match="expected 3 weights above 0"):
        mix(configs, (1, 1))
    with pytest.raises(ValueError, match="expected 3 weights above 0"):
        mix(configs, (1, 0, 1))
    with pytest.raises(ValueError, match="has no sources"):
        Mixture(())
