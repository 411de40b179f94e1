"""Use of a trained model: load, encode, classify, search, and the commands that take a model."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import imgtune_jax
from imgtune_jax import cli, interop, report
from imgtune_jax.errors import UserError
from tests import debug_run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished debug run with one evaluator, and the model that `train` returned."""
    c = debug_run.config_dict()
    c.total.steps = 2
    c.checkpoint.every.steps = 1
    test = dict(name="webdataset", path="corpora/emoji/heldout.tar", image=("google.webp",),
                captions=dict(name=("name", "en")))  # fmt: skip
    c.evals = dict(toy=dict(name="retrieval", source=test, caption_set="name"))
    workdir = tmp_path_factory.mktemp("run")
    previous_folder = Path.cwd()
    os.chdir(ROOT)
    model = imgtune_jax.train(c, workdir)
    report.write_run_report(workdir, model.predictor)
    yield workdir, model
    os.chdir(previous_folder)


@pytest.fixture(scope="module")
def run(trained):
    return trained[0]


@pytest.fixture(scope="module")
def model(run):
    return imgtune_jax.load(run)


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "c.webp"):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(tmp_path / name)
    return tmp_path


def test_parameters_that_are_not_finite_are_refused(model, tmp_path):
    params = dict(model.predictor.params, logit_scale=jnp.float32(np.nan))
    predictor = model.predictor.with_params(params)
    with pytest.raises(UserError, match=r"step 2: 1 of \d+ arrays .* not finite: logit_scale"):
        dataclasses.replace(model, predictor=predictor)
    saved = model.save(tmp_path / "saved")
    interop.save_params(params, saved / "params.safetensors")
    with pytest.raises(UserError, match="not finite: logit_scale"):
        imgtune_jax.load(saved)


def test_embeddings_have_unit_norm_and_are_independent_of_the_batch(model, photos):
    paths = sorted(photos.iterdir())
    images = model.encode_image(paths)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(model.encode_image(paths[1]), images[1:2], atol=1e-6)
    texts = model.encode_text(["a red apple", "a dog"])
    np.testing.assert_allclose(model.encode_text("a dog"), texts[1:], atol=1e-6)


def test_paths_pil_images_and_arrays_have_equal_embeddings(model, photos):
    path = photos / "a.png"
    image = Image.open(path)
    expected = model.encode_image(path)
    array = np.asarray(image)
    for same_image in (str(path), image, array, [image], array[None]):
        np.testing.assert_allclose(model.encode_image(same_image), expected, atol=1e-6)


def test_classify_returns_probabilities_in_descending_order(model, photos):
    (labels,) = model.classify(photos / "a.png", ["cat", "dog", "car"], ["a {}", "the {}"])
    probabilities = [x.probability for x in labels]
    assert probabilities == sorted(probabilities, reverse=True)
    assert abs(sum(probabilities) - 1) < 1e-5
    assert {x.name for x in labels} == {"cat", "dog", "car"}


def test_search_orders_by_similarity_and_finds_the_query_image_first(model, photos):
    paths = [str(p) for p in sorted(photos.iterdir())]
    hits = model.search(paths[2], model.encode_image(paths), k=3)
    assert hits[0].index == 2 and hits[0].score == pytest.approx(1, abs=1e-5)
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    by_text = model.search("a dog", paths, k=2)
    scores = model.encode_image(paths) @ model.encode_text("a dog")[0]
    assert [h.index for h in by_text] == list(np.argsort(-scores)[:2])


def test_saved_folder_loads_as_the_same_model(model, photos, tmp_path_factory):
    folder = model.save(tmp_path_factory.mktemp("export") / "model")
    loaded = imgtune_jax.load(folder)
    path = photos / "a.png"
    np.testing.assert_array_equal(loaded.encode_image(path), model.encode_image(path))
    np.testing.assert_array_equal(loaded.encode_text("a dog"), model.encode_text("a dog"))
    with pytest.raises(FileExistsError):
        model.save(folder)


def test_train_returns_the_model_that_load_reads(trained, model):
    _, returned = trained
    assert returned.step == model.step == 2
    np.testing.assert_array_equal(returned.encode_text("a dog"), model.encode_text("a dog"))
    assert returned.predictor.feature_memo is None


def test_load_reads_the_checkpoint_of_a_given_step(run, model):
    first = imgtune_jax.load(run, step=1)
    assert (first.step, model.step) == (1, 2)
    assert np.any(first.encode_text("a dog") != model.encode_text("a dog"))
    relative = Path(os.path.relpath(run, ROOT))
    assert np.all(imgtune_jax.load(relative).encode_text("a dog") == model.encode_text("a dog"))
    with pytest.raises(FileNotFoundError, match=r"saved steps:? \[1, 2\]"):
        imgtune_jax.load(run, step=7)


def test_error_names_the_bad_input(model, photos):
    (photos / "bad.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"bad\.png: not_an_image"):
        model.encode_image([photos / "a.png", photos / "bad.png"])
    with pytest.raises(FileNotFoundError, match="no image at"):
        model.encode_image("nowhere.png")
    with pytest.raises(ValueError, match="no images given"):
        model.encode_image([])
    with pytest.raises(FileNotFoundError, match="no config at"):
        imgtune_jax.load(photos)
    with pytest.raises(
        ValueError, match="this model has no decoder, so it cannot generate captions"
    ):
        model.caption(photos / "a.png")
    with pytest.raises(
        ValueError, match="language = 'de', but this model was trained without pref"
    ):
        model.caption(photos / "a.png", language="de")


def imgtune(capsys, *arguments):
    cli.main([str(a) for a in arguments])
    return capsys.readouterr().out


def test_commands_summarize_search_classify_and_embed(run, photos, capsys, tmp_path):
    summary = imgtune(capsys, "info", run)
    assert "saved steps: 1, 2" in summary and "vit mu/16" in summary and "toy" in summary
    hits = imgtune(capsys, "search", "--model", run, "--query", photos / "a.png", photos)
    assert hits.splitlines()[0] == f"1.000  {photos / 'a.png'}"
    labels = imgtune(
        capsys, "classify", "--model", run, "--labels", "cat", "dog", "--images", photos / "a.png"
    )
    assert "cat" in labels and "%" in labels
    (tmp_path / "texts").write_text("a dog\na cat\n")
    out = tmp_path / "out.npz"
    imgtune(capsys, "embed", "--model", run, "--texts", tmp_path / "texts", "--output", out, photos)
    with np.load(out) as stored:
        assert stored["image_features"].shape[0] == 3 and stored["text_features"].shape[0] == 2
    assert hits == imgtune(capsys, "search", "--model", run, "--query", photos / "a.png", out)


def test_commands_need_no_checkout_and_eval_reads_the_same_files_from_any_folder(run, photos):
    code = """
import sys
sys.modules["configs"] = None  # as in an installed package
from imgtune_jax.cli import main
run, photo = sys.argv[1:]
main(["info", run])
main(["classify", "--model", run, "--labels", "cat", "dog", "--images", photo])
main(["eval", "--workdir", run])
"""
    completed = subprocess.run(
        [sys.executable, "-P", "-c", code, str(run), "a.png"],
        capture_output=True,
        text=True,
        cwd=photos,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert "saved steps: 1, 2" in completed.stdout and "a.png: " in completed.stdout, (
        completed.stderr
    )
    assert completed.returncode == 0 and "Report: " in completed.stdout, completed.stderr


def test_eval_command_repeats_the_results_of_training(run, capsys):
    lines = (run / "results.jsonl").read_text().splitlines()
    imgtune(capsys, "eval", "--workdir", run)
    new = (run / "results.jsonl").read_text().splitlines()
    assert len(new) == len(lines) + 1
    assert json.loads(new[-1])["metrics"] == json.loads(lines[-1])["metrics"]
    assert (run / "report.html").stat().st_size > 10_000


def test_evaluation_of_an_older_step_prints_its_results_and_leaves_the_report(run, capsys):
    page = run / "report.html"
    page.write_text("the report of step 2")
    printed = imgtune(capsys, "eval", "--workdir", run, "--step", "1")
    assert json.loads((run / "results.jsonl").read_text().split("\n")[-2])["step"] == 1
    assert printed.startswith(report.summary(run, step=1)) and report.summary(
        run, step=1
    ) != report.summary(run)
    assert "Report: not rewritten" in printed and page.read_text() == "the report of step 2"
