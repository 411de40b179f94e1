"""The feature cache changes no loss, survives kills, and never returns features of another key."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from imgtune_jax import data, info, models, param_tree
from imgtune_jax.training import feature_cache, loop
from imgtune_jax.training.experiment import build_experiment
from tests.debug_run import ROOT, losses, settings, signal_after, start

# No augmentation, and one caption per record. Six steps are three epochs.
DETERMINISTIC = {
    "data.transforms": (),
    "data.caption_weights": dict(name=1.0),
    "total.steps": 6,
    "batch_size": 1568,
    "log_every": 1,
}


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def cached(folder, dtype="float32", image_views=1, text_views=1):
    """Return the config changes for a feature cache in `folder`."""
    fields = dict(path=str(folder), dtype=dtype, image_views=image_views, text_views=text_views)
    return {f"cache.{k}": v for k, v in fields.items()}


def build(**changes):
    """Return (experiment, frozen parameters) of the debug config with changes."""
    experiment = build_experiment(settings(**changes))
    return experiment, experiment.split_params(experiment.init_params())[1]


def stored_features(folder):
    """Return {tower: all rows of its store} of a cache folder."""
    features = {}
    for path in sorted(folder.iterdir()):
        store = data.FeatureStore.load(path)
        views, ids = (x.ravel() for x in np.indices((store.views, store.num_records)))
        features[path.name.partition("-")[0]] = store.read(views, ids)[0]
    return features


TWO_LAYERS = {
    f"model.{tower}": dict(settings().model[tower], depth=2, **dropout)
    for tower, dropout in (("image", {"dropout": 0.0}), ("text", {}))
}
DECODER = dict(name="transformer", variant="mu", vocab_size=30522, max_length=12, chunk=1)
LOCKS = {
    "image": {"lock.image": True},
    "text": {"lock.text": True},
    "both towers: the heads train": {"lock.image": True, "lock.text": True},
    "all but the last layers: tokens": {
        **TWO_LAYERS,
        "lock.image": True,
        "lock.image_unlocked_layers": 1,
        "lock.text": True,
        "lock.text_unlocked_layers": 1,
    },
    "a full tower whose tokens a decoder reads": {
        "lock.image": True,
        "model.decoder": DECODER,
        "objectives": dict(softmax=dict(weight=1.0), captioning=dict(weight=1.0)),
    },
    "a full convolutional tower whose tokens a pooler reads": {
        "lock.image": True,
        "model.image": dict(name="resnet", stage_sizes=(1, 1), width=16, norm="group"),
        "model.image_pooler": dict(name="attentional", width=32, num_queries=3),
    },
    "all but the attention pooling: tokens": {"lock.patterns": (r"image/(?!pool/).*",)},
}


@pytest.mark.parametrize("lock_changes", LOCKS.values(), ids=LOCKS)
def test_cached_run_equals_uncached_run(tmp_path, lock_changes):
    changes = {**DETERMINISTIC, **lock_changes}
    loop.train(settings(**changes), tmp_path / "uncached")
    loop.train(settings(**changes, **cached(tmp_path / "cache")), tmp_path / "cached")
    # The frozen prefix is compiled separately, so float32 sums round differently.
    np.testing.assert_allclose(
        losses(tmp_path / "cached"), losses(tmp_path / "uncached"), rtol=1e-5
    )
    towers = {"image", "text"} & {p.name.partition("-")[0] for p in (tmp_path / "cache").iterdir()}
    expected = {t for t in ("image", "text") if f"lock.{t}" in lock_changes} or {"image"}
    assert towers == expected


def test_cached_equals_uncached_over_fifty_steps(tmp_path):
    changes = {**DETERMINISTIC, "lock.image": True, "total.steps": 50, "batch_size": 128}
    loop.train(settings(**changes), tmp_path / "uncached")
    loop.train(settings(**changes, **cached(tmp_path / "cache")), tmp_path / "cached")
    np.testing.assert_allclose(
        losses(tmp_path / "cached"), losses(tmp_path / "uncached"), rtol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_cache_filled_during_training_equals_cache_filled_ahead(tmp_path, dtype):
    """Images have two augmented views, captions are sampled, and both towers are cached."""
    augmented = settings().data
    changes = {**DETERMINISTIC, **LOCKS["both towers: the heads train"]}
    changes["data.transforms"] = augmented.transforms
    changes["data.caption_weights"] = augmented.caption_weights
    during = changes | cached(tmp_path / "during", dtype, image_views=2)
    loop.train(settings(**during), tmp_path / "a")
    ahead = changes | cached(tmp_path / "ahead", dtype, image_views=2)
    feature_cache.fill_cache(build(**ahead)[0])
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "ahead").glob("*/*")}
    loop.train(settings(**ahead), tmp_path / "b")
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "ahead").glob("*/*")} == times
    filled_during = stored_features(tmp_path / "during")
    filled_ahead = stored_features(tmp_path / "ahead")
    assert filled_during.keys() == {"image", "text"}
    for tower in filled_during:
        # The same row may round differently in another batch, by at most one step of the dtype.
        step = {"float32": 1e-6, "bfloat16": 2**-7, "int8": 2 / 127}[dtype]
        scale = np.abs(filled_ahead[tower]).max(-1, keepdims=True)
        assert (np.abs(filled_during[tower] - filled_ahead[tower]) <= step * scale).all()
    np.testing.assert_allclose(
        losses(tmp_path / "a"), losses(tmp_path / "b"), rtol=1e-5 if dtype == "float32" else 1e-3
    )


def test_run_killed_while_filling_equals_uninterrupted_run(tmp_path):
    """Losses and stored features are equal bit for bit."""
    common = ["--config.lock.image=True", "--config.batch_size=256", "--config.cache.image_views=2"]
    paths = {name: tmp_path / f"{name}_cache" for name in ("uninterrupted", "killed")}
    flags = {name: [*common, f"--config.cache.path={paths[name]}"] for name in paths}
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    assert start(uninterrupted, *flags["uninterrupted"]).wait(timeout=400) == 0
    process = start(killed, *flags["killed"])
    assert signal_after(process, killed, 8, signal.SIGKILL) == -9  # an epoch is 12.3 steps
    assert start(killed, *flags["killed"]).wait(timeout=400) == 0
    assert (killed / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
    np.testing.assert_array_equal(
        stored_features(paths["killed"])["image"], stored_features(paths["uninterrupted"])["image"]
    )


def test_fill_cache_continues_where_it_stopped(tmp_path):
    changes = {**DETERMINISTIC, "lock.image": True, "batch_size": 512}
    feature_cache.fill_cache(build(**changes, **cached(tmp_path / "full"))[0])
    experiment, frozen = build(**changes, **cached(tmp_path / "stopped"))
    batch_source = feature_cache.build_batch_source(experiment, frozen)
    ordered = dataclasses.replace(
        batch_source, pipeline=dataclasses.replace(batch_source.pipeline, shuffle=False)
    )
    for _ in itertools.islice(ordered.batches(0), 3):
        ordered.flush()
    feature_cache.fill_cache(experiment)
    uninterrupted, continued = (stored_features(tmp_path / name) for name in ("full", "stopped"))
    np.testing.assert_array_equal(uninterrupted["image"], continued["image"])


def test_features_do_not_depend_on_the_mesh(tmp_path):
    changes = {**DETERMINISTIC, "lock.image": True, "total.steps": 3}
    for name, mesh in (("data", (8, 1, 1)), ("mixed", (2, 2, 2))):
        sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
        loop.train(
            settings(**changes, **sizes, **cached(tmp_path / name)), tmp_path / f"{name}_run"
        )
    np.testing.assert_allclose(
        stored_features(tmp_path / "data")["image"],
        stored_features(tmp_path / "mixed")["image"],
        rtol=1e-4,
        atol=1e-5,
    )


def test_second_run_decodes_no_image_and_runs_no_frozen_prefix(tmp_path, monkeypatch):
    changes = {**DETERMINISTIC, "lock.image": True, **cached(tmp_path / "cache", text_views=0)}
    loop.train(settings(**changes), tmp_path / "first")

    def fail(*args, **kwargs):
        raise AssertionError("computed features that are in the cache")

    # The check before training decodes images, to find one that is usable.
    monkeypatch.setattr("imgtune_jax.data.Pipeline.check_records", lambda self: None)
    monkeypatch.setattr("imgtune_jax.data.image.open_image", fail)
    monkeypatch.setattr("imgtune_jax.training.batch_source.BatchSource._compute_features", fail)
    changes["optim.lr"] = 0.5  # another run, the same key
    loop.train(settings(**changes), tmp_path / "second")
    assert losses(tmp_path / "second")[0] == losses(tmp_path / "first")[0]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_step_needs_no_parameter_of_a_cached_prefix(tmp_path):
    lock = LOCKS["all but the last layers: tokens"]
    experiment, frozen = build(**DETERMINISTIC, **lock, **cached(tmp_path))
    batch_source = feature_cache.build_batch_source(experiment, frozen)
    assert frozen["image"] and frozen["text"]
    assert not jax.tree.leaves(param_tree.select(frozen, batch_source.needs_param))


RESIZE = dict(name="resize", size=64, mode="squash")
IMAGE_KEY_CHANGES = {
    "weights": {"seed": 1},
    "resize": {"preprocess": (RESIZE | dict(interpolation="bilinear"),)},
    "augmentation": {"data.transforms": (dict(name="horizontal_flip"), RESIZE)},
    "normalization": {"model.image_mean": (0.0, 0.0, 0.0)},
    "architecture": {"model.image": dict(name="vit", variant="mu/16", pool="mean")},
    "layers": {"lock.patterns": (r"image/(?!pool/).*",), "lock.image": False},
    "compute dtype": {"model.dtype": "bfloat16"},
    "stored dtype": {"cache.dtype": "int8"},
    "views": {"cache.image_views": 2},
    "data": {"data.source.image": ("google.webp",)},
}
TEXT_KEY_CHANGES = {
    "tokenizer": {"tokenizer.length": 11},
    "captions": {"data.caption_weights": dict(keywords=1.0)},
    "stored dtype": {"cache.dtype": "int8"},
    "views": {"cache.text_views": 2},
}
ONE_MORE_OBJECTIVE = dict(sigmoid=dict(weight=1.0))


def store_names(**changes):
    """Return {tower: name of its store's folder} for the debug config with changes."""
    stores = feature_cache.open_stores(*build(**changes))
    return {tower: store.folder.name for tower, store in stores.items()}


@pytest.fixture(scope="module")
def base_names(tmp_path_factory):
    """(config changes that cache both towers, names of their stores)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        folder = tmp_path_factory.mktemp("base")
        base_changes = {
            "data.transforms": (),
            **LOCKS["both towers: the heads train"],
            **cached(folder),
        }
        return base_changes, store_names(**base_changes)


@pytest.mark.parametrize("change", IMAGE_KEY_CHANGES.values(), ids=IMAGE_KEY_CHANGES)
def test_image_key_depends_on_every_part(base_names, change, caplog):
    base_changes, base = base_names
    with caplog.at_level("INFO", logger="imgtune_jax.training.feature_cache"):
        assert store_names(**(base_changes | change))["image"] != base["image"]
    assert "these features are not cached yet" in caplog.text


@pytest.mark.parametrize("change", TEXT_KEY_CHANGES.values(), ids=TEXT_KEY_CHANGES)
def test_text_key_depends_on_every_part(base_names, change):
    base_changes, base = base_names
    assert store_names(**(base_changes | change))["text"] != base["text"]


def test_key_does_not_depend_on_settings_that_change_no_feature(base_names):
    base_changes, base = base_names
    other = {"optim.lr": 0.5, "batch_size": 256, "model.embed_dim": 16}
    assert store_names(**(base_changes | other | {"objectives": ONE_MORE_OBJECTIVE})) == base
    experiment, frozen = build(**base_changes)
    seeded = dataclasses.replace(experiment, config=dataclasses.replace(experiment.config, seed=1))
    keys = [feature_cache.cache_key(e, frozen, "image") for e in (experiment, seeded)]
    assert keys[0] == keys[1], "deterministic preprocessing does not depend on the seed"


def test_keys_depend_on_the_version_of_the_code(base_names, monkeypatch):
    base_changes, base = base_names
    monkeypatch.setattr(models, "TOWERS_VERSION", models.TOWERS_VERSION + 1)
    changed = store_names(**base_changes)
    assert all(changed[tower] != base[tower] for tower in ("image", "text"))


def test_keys_depend_on_the_precision_of_matrix_products(base_names):
    base_changes, base = base_names
    with jax.default_matmul_precision("bfloat16"):
        changed = store_names(**base_changes)
    assert all(changed[tower] != base[tower] for tower in ("image", "text"))
    experiment, frozen = build(**base_changes)
    assert feature_cache.cache_key(experiment, frozen, "text")["matmul_precision"] == (
        "default on cpu"
    )


def test_keys_depend_on_the_files_of_the_data(base_names, tmp_path):
    base_changes, _ = base_names
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("filepath,title\na.png,an image\n")
    source = dict(name="folder", path=str(tmp_path), table=str(tmp_path / "t.csv"))
    changes = base_changes | {
        "data.source": source,
        "data.caption_weights": dict(caption=1.0),
    }
    before = store_names(**changes)
    os.utime(tmp_path / "a.png", (1, 1))
    after = store_names(**changes)
    assert all(after[tower] != before[tower] for tower in ("image", "text"))


def test_damaged_segment_is_computed_again(tmp_path, caplog):
    changes = {**DETERMINISTIC, "lock.image": True, **cached(tmp_path / "cache", text_views=0)}
    loop.train(settings(**changes), tmp_path / "first")
    before = stored_features(tmp_path / "cache")["image"]
    damaged = sorted((tmp_path / "cache").glob("*/*.array_record"))[0]
    damaged.write_bytes(damaged.read_bytes()[:1000])
    loop.train(settings(**changes), tmp_path / "second")
    assert damaged.name in caplog.text and not damaged.exists()
    np.testing.assert_array_equal(losses(tmp_path / "second"), losses(tmp_path / "first"))
    np.testing.assert_array_equal(stored_features(tmp_path / "cache")["image"], before)


def test_store_whose_manifest_is_damaged_does_not_end_another_run(base_names, tmp_path):
    (tmp_path / "image-0123").mkdir()
    (tmp_path / "image-0123" / "manifest.json").write_text("")
    assert store_names(**(base_names[0] | {"cache.path": str(tmp_path)})) == base_names[1]


def test_store_of_another_key_is_an_error(base_names):
    base_changes, base = base_names
    experiment, frozen = build(**base_changes)
    manifest = (
        feature_cache.cache_root(experiment.config.cache.path) / base["image"] / "manifest.json"
    )
    original = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(original) | {"weights": "others"}))
    with pytest.raises(ValueError, match="these entries differ: weights"):
        feature_cache.open_stores(experiment, frozen)
    manifest.write_text(original)


def test_info_reports_the_cache(tmp_path):
    changes = {**DETERMINISTIC, "lock.image": True, **cached(tmp_path / "cache"), "total.steps": 4}
    loop.train(settings(**changes), tmp_path / "run")
    text = info.summarize_run(tmp_path / "run")
    (folder,) = (tmp_path / "cache").iterdir()
    assert "image: 3146 of 3146 rows (1 × 3146 records), 32 float32" in text
    assert folder.name in text and "an epoch read from it" in text
    folder.rename(tmp_path / "elsewhere")
    assert "does not exist" in info.summarize_run(tmp_path / "run")


def test_cache_command_fills_the_cache_and_prints_its_size(tmp_path):
    code = "from imgtune_jax.cli import main; import sys; main(['cache', *sys.argv[1:]])"
    flags = ["--config.lock.image=True", "--config.batch_size=1024"]
    flags.append(f"--config.cache.path={tmp_path}")
    process = subprocess.run(
        [sys.executable, "-c", code, "--config=configs/debug.py", *flags],
        capture_output=True,
        text=True,
    )
    assert "image: 3146 rows, " in process.stdout, process.stderr
    assert stored_features(tmp_path)["image"].shape == (3146, 32)


def test_filling_the_cache_without_a_locked_tower_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"nothing to cache: set config\.cache\.path, and lock"):
        feature_cache.fill_cache(build(**DETERMINISTIC, **cached(tmp_path))[0])
