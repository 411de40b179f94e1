"""Cached = uncached, filled on the way = filled before, killed = whole; no wrong store served."""

import dataclasses
import itertools
import json
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from imgtune_jax import data, info, param_tree
from imgtune_jax.training import experiment, feature_cache, loop, run
from tests.debug_run import ROOT, losses, settings, signal_after, start

# One view of an image, one caption; three epochs.
PLAIN = {"data.transforms": (), "data.caption_weights": dict(name=1.0), "total.steps": 6}
PLAIN |= {"batch_size": 1568, "log_every": 1}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def cached(folder, dtype="float32", image_views=1, text_views=1):
    fields = dict(path=str(folder), dtype=dtype, image_views=image_views, text_views=text_views)
    return {f"cache.{k}": v for k, v in fields.items()}


def opened(**changes):
    """(experiment, locked parameters, pipeline) of a config."""
    exp = experiment.build_experiment(settings(**changes))
    pipeline = run.training_pipeline(exp, data.build_source(exp.config.data.source))
    return exp, param_tree.split(exp.init_params(), exp.is_frozen)[1], pipeline


def stored(folder):
    """{tower: all its rows} of a cache folder."""
    out = {}
    for path in sorted(folder.iterdir()):
        store = data.FeatureStore.load(path)
        views, ids = (x.ravel() for x in np.indices((store.views, store.num_records)))
        out[path.name.partition("-")[0]] = store.read(views, ids)[0]
    return out


DEEP = {
    f"model.{tower}": dict(settings().model[tower], depth=2, **dropout)
    for tower, dropout in (("image", {"dropout": 0.0}), ("text", {}))
}
DECODER = dict(name="transformer", variant="mu", vocab_size=30522, max_length=12, chunk=1)
LOCKS = {
    "image": {"lock.image": True},
    "text": {"lock.text": True},
    "both towers: the heads train": {"lock.image": True, "lock.text": True},
    "all but the last layers: tokens": {
        **DEEP,
        "lock.image": True,
        "lock.image_unlocked_layers": 1,
        "lock.text": True,
        "lock.text_unlocked_layers": 1,
    },
    "a whole tower whose tokens a decoder reads": {
        "lock.image": True,
        "model.decoder": DECODER,
        "objectives": dict(softmax=dict(weight=1.0), captioning=dict(weight=1.0)),
    },
    "a whole convolutional tower whose tokens a pooler reads": {
        "lock.image": True,
        "model.image": dict(name="resnet", stage_sizes=(1, 1), width=16, norm="group"),
        "model.image_pooler": dict(name="attentional", width=32, num_queries=3),
    },
    "all but the attention pooling: tokens": {"lock.patterns": (r"image/(?!pool/).*",)},
}


@pytest.mark.parametrize("lock_changes", LOCKS.values(), ids=LOCKS)
def test_cached_run_equals_uncached_run(tmp_path, lock_changes):
    changes = {**PLAIN, **lock_changes}
    loop.train(settings(**changes), tmp_path / "uncached")
    changes |= cached(tmp_path / "cache")
    loop.train(settings(**changes), tmp_path / "cached", make_feed=feature_cache.build_batch_source)
    # one program or two: float32 sums round otherwise
    np.testing.assert_allclose(
        losses(tmp_path / "cached"), losses(tmp_path / "uncached"), rtol=1e-5
    )
    towers = {"image", "text"} & {p.name.partition("-")[0] for p in (tmp_path / "cache").iterdir()}
    wanted = {t for t in ("image", "text") if f"lock.{t}" in lock_changes} or {"image"}
    assert towers == wanted


def test_cached_equals_uncached_over_fifty_steps(tmp_path):
    changes = {**PLAIN, "lock.image": True, "total.steps": 50, "batch_size": 128}
    loop.train(settings(**changes), tmp_path / "uncached")
    changes |= cached(tmp_path / "cache")
    loop.train(settings(**changes), tmp_path / "cached", make_feed=feature_cache.build_batch_source)
    np.testing.assert_allclose(
        losses(tmp_path / "cached"), losses(tmp_path / "uncached"), rtol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_filled_while_training_equals_filled_before(tmp_path, dtype):
    """Two augmented views of the images, drawn captions for the texts, both stored."""
    drawn = settings().data
    changes = {**PLAIN, **LOCKS["both towers: the heads train"]}
    changes |= {"data.transforms": drawn.transforms, "data.caption_weights": drawn.caption_weights}
    during = changes | cached(tmp_path / "during", dtype, image_views=2)
    loop.train(settings(**during), tmp_path / "a", make_feed=feature_cache.build_batch_source)
    before = changes | cached(tmp_path / "before", dtype, image_views=2)
    feature_cache.fill_cache(*opened(**before))
    filled = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "before").glob("*/*")}
    loop.train(settings(**before), tmp_path / "b", make_feed=feature_cache.build_batch_source)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "before").glob("*/*")} == filled
    one, other = stored(tmp_path / "during"), stored(tmp_path / "before")
    assert one.keys() == {"image", "text"}
    for tower in one:
        # a row computed beside other rows may round otherwise, and then to the next stored value
        step = {"float32": 1e-6, "bfloat16": 2**-7, "int8": 2 / 127}[dtype]
        scale = np.abs(other[tower]).max(-1, keepdims=True)
        assert (np.abs(one[tower] - other[tower]) <= step * scale).all()
    np.testing.assert_allclose(
        losses(tmp_path / "a"), losses(tmp_path / "b"), rtol=1e-5 if dtype == "float32" else 1e-3
    )


def test_killed_while_filling_equals_whole(tmp_path):
    """Bit for bit, in the losses and in the store."""
    common = ["--config.lock.image=True", "--config.batch_size=256", "--config.cache.image_views=2"]
    paths = {name: tmp_path / f"{name}_cache" for name in ("whole", "broken")}
    flags = {name: [*common, f"--config.cache.path={paths[name]}"] for name in paths}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole, *flags["whole"]).wait(timeout=400) == 0
    process = start(broken, *flags["broken"])
    assert signal_after(process, broken, 8, signal.SIGKILL) == -9  # an epoch is 12.3 steps
    assert start(broken, *flags["broken"]).wait(timeout=400) == 0
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    np.testing.assert_array_equal(stored(paths["broken"])["image"], stored(paths["whole"])["image"])


def test_a_build_that_was_stopped_goes_on(tmp_path, monkeypatch):
    changes = {**PLAIN, "lock.image": True, "batch_size": 512}
    feature_cache.fill_cache(*opened(**changes, **cached(tmp_path / "whole")))
    stopped = opened(**changes, **cached(tmp_path / "stopped"))
    ordered = feature_cache.build_batch_source(
        stopped[0], stopped[1], dataclasses.replace(stopped[2], shuffle=False)
    )
    for _ in itertools.islice(ordered.batches(0), 3):
        ordered.flush()
    feature_cache.fill_cache(*stopped)
    one, other = stored(tmp_path / "whole"), stored(tmp_path / "stopped")
    np.testing.assert_array_equal(one["image"], other["image"])


def test_any_mesh_stores_the_same(tmp_path):
    changes = {**PLAIN, "lock.image": True, "total.steps": 3}
    for name, mesh in (("data", (8, 1, 1)), ("mixed", (2, 2, 2))):
        sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
        run = settings(**changes, **sizes, **cached(tmp_path / name))
        loop.train(run, tmp_path / f"{name}_run", make_feed=feature_cache.build_batch_source)
    np.testing.assert_allclose(
        stored(tmp_path / "data")["image"],
        stored(tmp_path / "mixed")["image"],
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_second_run_decodes_no_image_and_runs_no_locked_tower(tmp_path, monkeypatch):
    changes = {**PLAIN, "lock.image": True, **cached(tmp_path / "cache", text_views=0)}
    loop.train(settings(**changes), tmp_path / "first", make_feed=feature_cache.build_batch_source)

    def fail(*args, **kwargs):
        raise AssertionError("this is in the cache")

    monkeypatch.setattr("imgtune_jax.data.image.open_image", fail)
    monkeypatch.setattr("imgtune_jax.training.feature_cache.CachedFeed._compute_features", fail)
    changes["optim.lr"] = 0.5  # another run, the same key
    loop.train(settings(**changes), tmp_path / "second", make_feed=feature_cache.build_batch_source)
    assert losses(tmp_path / "second")[0] == losses(tmp_path / "first")[0]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_step_is_given_no_cached_parameter(tmp_path):
    changes = {**PLAIN, **LOCKS["all but the last layers: tokens"], **cached(tmp_path)}
    exp, locked, pipeline = opened(**changes)
    needed = param_tree.select(
        locked, feature_cache.build_batch_source(exp, locked, pipeline).needs_param
    )
    assert locked["image"] and locked["text"]
    assert not jax.tree.leaves(needed)


RESIZE = dict(name="resize", size=64, mode="squash")
KEY_PARTS = {
    "weights": {"seed": 1},
    "resize": {"preprocess": (RESIZE | dict(interpolation="bilinear"),)},
    "augmentation": {"data.transforms": (dict(name="horizontal_flip"), RESIZE)},
    "normalisation": {"model.image_mean": (0.0, 0.0, 0.0)},
    "architecture": {"model.image": dict(name="vit", variant="mu/16", pool="mean")},
    "layers": {"lock.patterns": (r"image/(?!pool/).*",), "lock.image": False},
    "compute dtype": {"model.dtype": "bfloat16"},
    "stored dtype": {"cache.dtype": "int8"},
    "views": {"cache.image_views": 2},
    "data": {"data.source.image": ("google.webp",)},
}
TEXT_KEY_PARTS = {
    "tokenizer": {"tokenizer.length": 11},
    "captions": {"data.caption_weights": dict(keywords=1.0)},
    "stored dtype": {"cache.dtype": "int8"},
    "views": {"cache.text_views": 2},
}


def names(**changes):
    return {t: s.folder.name for t, s in feature_cache.open_stores(*opened(**changes)).items()}


@pytest.fixture(scope="module")
def base_names(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        folder = tmp_path_factory.mktemp("base")
        both = {"data.transforms": (), **LOCKS["both towers: the heads train"], **cached(folder)}
        return both, names(**both)


@pytest.mark.parametrize("change", KEY_PARTS.values(), ids=KEY_PARTS)
def test_every_part_of_the_image_key_counts(base_names, change, caplog):
    both, base = base_names
    with caplog.at_level("INFO", logger="imgtune_jax.training.feature_cache"):
        assert names(**(both | change))["image"] != base["image"]
    assert "no cache of these features: new are" in caplog.text


@pytest.mark.parametrize("change", TEXT_KEY_PARTS.values(), ids=TEXT_KEY_PARTS)
def test_every_part_of_the_text_key_counts(base_names, change):
    both, base = base_names
    assert names(**(both | change))["text"] != base["text"]


def test_what_changes_no_feature_changes_no_key(base_names):
    both, base = base_names
    other = {"optim.lr": 0.5, "batch_size": 256, "model.embed_dim": 16, "objectives": ONE_MORE}
    assert names(**(both | other)) == base
    exp, locked, pipeline = opened(**both)
    seeded = dataclasses.replace(exp, config=dataclasses.replace(exp.config, seed=1))
    parts = [feature_cache.cache_key(e, locked, "image", pipeline.source) for e in (exp, seeded)]
    assert parts[0] == parts[1], "preprocessing alone draws nothing"


ONE_MORE = dict(sigmoid=dict(weight=1.0))


def test_a_folder_of_another_origin_is_refused(base_names):
    both, base = base_names
    exp, locked, pipeline = opened(**both)
    manifest = feature_cache.cache_root(exp.config.cache.path) / base["image"] / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(whole) | {"weights": "others"}))
    with pytest.raises(ValueError, match="of another origin; they differ in weights"):
        feature_cache.open_stores(exp, locked, pipeline)
    manifest.write_text(whole)


def test_info_says_what_was_cached(tmp_path):
    changes = {**PLAIN, "lock.image": True, **cached(tmp_path / "cache"), "total.steps": 4}
    loop.train(settings(**changes), tmp_path / "run", make_feed=feature_cache.build_batch_source)
    told = info.summarize_run(tmp_path / "run")
    (folder,) = (tmp_path / "cache").iterdir()
    assert "image: 3146 of 3146 rows (1 × 3146 records), 32 float32" in told
    assert folder.name in told and "an epoch read from it saves" in told
    folder.rename(tmp_path / "elsewhere")
    assert "which is gone" in info.summarize_run(tmp_path / "run")


def test_the_command_builds_ahead_and_says_what_it_made(tmp_path):
    code = "from imgtune_jax.cli import main; import sys; main(['cache', *sys.argv[1:]])"
    flags = [*FLAGS, f"--config.cache.path={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-c", code, "--config=configs/debug.py", *flags],
        capture_output=True,
        text=True,
    )
    assert "image: 3146 rows, " in done.stdout, done.stderr
    assert stored(tmp_path)["image"].shape == (3146, 32)


FLAGS = ["--config.lock.image=True", "--config.batch_size=1024"]


def test_nothing_to_cache_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"nothing to cache: set config\.cache\.path, and lock"):
        feature_cache.fill_cache(*opened(**PLAIN, **cached(tmp_path)))
