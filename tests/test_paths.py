"""Paths in configs and arguments: `~`, relative paths, and patterns."""

import os
from pathlib import Path

import pytest

import imgtune_jax
from imgtune_jax import data, interop, paths
from imgtune_jax.training import workdir_files
from imgtune_jax.training.experiment import build_experiment
from tests import debug_run

ROOT = Path(__file__).parents[1]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder that is also the current folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_home_folder_and_current_folder_give_the_same_absolute_path(home):
    for path in ("~/data/x.tar", "data/x.tar", "./data/x.tar", home / "data/x.tar"):
        assert paths.absolute_path(path) == str(home / "data" / "x.tar")


@pytest.mark.parametrize("path", [None, "", "gs://bucket/data"])
def test_what_is_no_local_path_is_unchanged(path):
    assert paths.absolute_path(path) == path


def test_each_choice_of_a_pattern_is_absolute(home):
    expected = f"{{{home}/a,/data/b}}/{{0..3}}.tar"
    assert paths.absolute_path("{a,/data/b}/{0..3}.tar") == expected
    assert paths.absolute_path(["~/{0..3}.tar", "x*.tar"]) == (
        f"{home}/{{0..3}}.tar",
        f"{home}/x*.tar",
    )


def test_pattern_in_a_folder_with_brackets_finds_its_files(tmp_path, monkeypatch):
    folder = tmp_path / "[1]"
    folder.mkdir()
    (folder / "a.tar").touch()
    monkeypatch.chdir(folder)
    assert list(Path("/").glob(paths.absolute_path("*.tar")[1:])) == [folder / "a.tar"]


def config_with_every_path():
    """Return a config with a relative path at every place that may have one."""
    tree = debug_run.settings().to_dict()
    folder = dict(name="folder", path="photos", table="pairs.csv")
    tfds = dict(name="tfds", dataset="tiny", data_dir="tfds")
    tree["data"]["source"] = dict(name="mixture", sources=(folder, tfds))
    tars = dict(name="webdataset", path=("a.tar", "b{0..3}.tar"))
    tree["evals"] = dict(probe=dict(name="linear_probe", source=tars, train_source=tars))
    tree["weights"] = dict(image=dict(format="params", path="image.npz"), text={})
    tree["tokenizer"] = dict(path="tokenizer", length=8)
    tree["cache"]["path"] = "cache"
    return tree


def test_every_path_of_a_config_is_made_absolute(home):
    resolved = paths.absolute_config(config_with_every_path())
    folder, tfds = resolved["data"]["source"]["sources"]
    assert folder == dict(name="folder", path=f"{home}/photos", table=f"{home}/pairs.csv")
    assert tfds == dict(name="tfds", dataset="tiny", data_dir=f"{home}/tfds")
    for source in ("source", "train_source"):
        tars = resolved["evals"]["probe"][source]["path"]
        assert tars == (f"{home}/a.tar", f"{home}/b{{0..3}}.tar")
    assert resolved["weights"]["image"]["path"] == f"{home}/image.npz"
    assert resolved["tokenizer"]["path"] == f"{home}/tokenizer"
    assert resolved["cache"]["path"] == f"{home}/cache"
    assert paths.absolute_config(resolved) == resolved


def test_package_files_and_the_automatic_cache_are_not_paths(home):
    tree = config_with_every_path()
    tree["tokenizer"] = dict(package="some_package", path="*tokenizer.json", length=8)
    tree["weights"]["text"] = dict(format="bert", package="some_package")
    tree["cache"]["path"] = "auto"
    tree["evals"] = dict(zero=dict(name="zeroshot", templates=dict(table=("a table",))))
    resolved = paths.absolute_config(tree)
    assert {k: resolved[k] for k in ("tokenizer", "evals")} == {
        k: tree[k] for k in ("tokenizer", "evals")
    }
    assert resolved["weights"]["text"] == tree["weights"]["text"]
    assert resolved["cache"]["path"] == "auto"


def test_same_config_in_another_folder_is_another_run(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    here = build_experiment(debug_run.settings()).config
    assert here.data.source["path"] == str(ROOT / "corpora/emoji/seen.tar")
    workdir_files.write_config(here, tmp_path)
    workdir_files.check_same_config(debug_run.settings(), tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data\.source\.path: '/.*' in the saved run"):
        workdir_files.check_same_config(debug_run.settings(), tmp_path)


def test_run_that_recorded_relative_paths_resumes_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    workdir_files.write_config(debug_run.settings(), tmp_path)
    assert '"path": "corpora/emoji/seen.tar"' in (tmp_path / "config.json").read_text()
    workdir_files.check_same_config(build_experiment(debug_run.settings()).config, tmp_path)


def test_python_functions_expand_the_home_folder(home):
    tokenizer = data.train_tokenizer(["a b"], "~/tokenizer", vocab_size=270, length=8)
    assert data.load_tokenizer("~/tokenizer", length=8).fingerprint == tokenizer.fingerprint
    interop.save_params({"a": {"b": tokenizer([""])[0]}}, "~/params.safetensors")
    assert "a" in interop.load_params("~/params.safetensors")
    assert sorted(os.listdir(home)) == ["params.safetensors", "tokenizer"]
    (home / "photos" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"no images in {home}/photos"):
        data.build_source(dict(name="folder", path="~/photos"))
    with pytest.raises(ValueError, match=f"no config at {home}/run/config.json"):
        imgtune_jax.load("~/run")
