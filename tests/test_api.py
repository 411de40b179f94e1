"""Using a run: load, encode, classify, search, and the command line, as a newcomer would."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import imgtune_jax
from imgtune_jax import cli, config, report
from imgtune_jax.training import loop

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished debug run with one evaluator."""
    spec = importlib.util.spec_from_file_location("debug", ROOT / "configs" / "debug.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config()
    c.total.steps = 2
    c.checkpoint.every.steps = 1
    test = dict(name="webdataset", path="corpora/emoji/heldout.tar", image=("google.webp",),
                captions=dict(name=("name", "en")))  # fmt: skip
    c.evals = dict(toy=dict(name="retrieval", source=test, caption_set="name"))
    workdir = tmp_path_factory.mktemp("run")
    before = Path.cwd()
    os.chdir(ROOT)
    encoders = loop.train(config.parse_config(c), workdir)
    report.write_run_report(workdir, encoders)
    yield workdir
    os.chdir(before)


@pytest.fixture(scope="module")
def model(run):
    return imgtune_jax.load(run)


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "c.webp"):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(tmp_path / name)
    return tmp_path


def test_embeddings_have_unit_norm_and_do_not_depend_on_the_batch(model, photos):
    paths = sorted(photos.iterdir())
    rows = model.encode_image(paths)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(model.encode_image(paths[1]), rows[1:2], atol=1e-6)
    texts = model.encode_text(["a red apple", "a dog"])
    np.testing.assert_allclose(model.encode_text("a dog"), texts[1:], atol=1e-6)


def test_paths_pil_images_and_arrays_mean_the_same(model, photos):
    path = photos / "a.png"
    image = Image.open(path)
    wanted = model.encode_image(path)
    for given in (str(path), image, np.asarray(image), [image], np.asarray(image)[None]):
        np.testing.assert_allclose(model.encode_image(given), wanted, atol=1e-6)


def test_classify_gives_probabilities_best_first(model, photos):
    (labels,) = model.classify(photos / "a.png", ["cat", "dog", "car"], ["a {}", "the {}"])
    p = [x.probability for x in labels]
    assert p == sorted(p, reverse=True) and abs(sum(p) - 1) < 1e-5
    assert {x.name for x in labels} == {"cat", "dog", "car"}


def test_search_finds_an_image_by_itself_and_orders_by_similarity(model, photos):
    paths = [str(p) for p in sorted(photos.iterdir())]
    hits = model.search(paths[2], model.encode_image(paths), k=3)
    assert hits[0].index == 2 and hits[0].score == pytest.approx(1, abs=1e-5)
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    by_text = model.search("a dog", paths, k=2)
    scores = model.encode_image(paths) @ model.encode_text("a dog")[0]
    assert [h.index for h in by_text] == list(np.argsort(-scores)[:2])


def test_a_saved_folder_loads_to_the_same_model(model, photos, tmp_path_factory):
    folder = model.save(tmp_path_factory.mktemp("export") / "model")
    again = imgtune_jax.load(folder)
    path = photos / "a.png"
    np.testing.assert_array_equal(again.encode_image(path), model.encode_image(path))
    np.testing.assert_array_equal(again.encode_text("a dog"), model.encode_text("a dog"))
    with pytest.raises(FileExistsError):
        model.save(folder)


def test_a_saved_step_can_be_chosen(run, model):
    first = imgtune_jax.load(run, step=1)
    assert (first.step, model.step) == (1, 2)
    assert np.any(first.encode_text("a dog") != model.encode_text("a dog"))
    nearby = Path(os.path.relpath(run, ROOT))
    assert np.all(imgtune_jax.load(nearby).encode_text("a dog") == model.encode_text("a dog"))
    with pytest.raises(FileNotFoundError, match=r"saved steps: \[1, 2\]"):
        imgtune_jax.load(run, step=7)


def test_wrong_input_is_named(model, photos):
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
    with pytest.raises(ValueError, match="no language 'de': this model was trained without pref"):
        model.caption(photos / "a.png", language="de")


def imgtune(capsys, *arguments):
    cli.main([str(a) for a in arguments])
    return capsys.readouterr().out


def test_command_line_describes_searches_classifies_and_embeds(run, photos, capsys, tmp_path):
    told = imgtune(capsys, "info", run)
    assert "saved steps: 1, 2" in told and "vit mu/16" in told and "toy" in told
    found = imgtune(capsys, "search", "--model", run, "--query", photos / "a.png", photos)
    assert found.splitlines()[0] == f"1.000  {photos / 'a.png'}"
    named = imgtune(
        capsys, "classify", "--model", run, "--labels", "cat", "dog", "--images", photos / "a.png"
    )
    assert "cat" in named and "%" in named
    (tmp_path / "texts").write_text("a dog\na cat\n")
    out = tmp_path / "out.npz"
    imgtune(capsys, "embed", "--model", run, "--texts", tmp_path / "texts", "--output", out, photos)
    with np.load(out) as stored:
        assert stored["image_features"].shape[0] == 3 and stored["text_features"].shape[0] == 2
    again = imgtune(capsys, "search", "--model", run, "--query", photos / "a.png", out)
    assert again == found


def test_eval_alone_repeats_what_training_reported(run, capsys):
    lines = (run / "results.jsonl").read_text().splitlines()
    imgtune(capsys, "eval", "--workdir", run)
    new = (run / "results.jsonl").read_text().splitlines()
    assert len(new) == len(lines) + 1
    assert json.loads(new[-1])["metrics"] == json.loads(lines[-1])["metrics"]
    assert (run / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["info", "nowhere"], "no config at nowhere"),
        (["search", "--model", "nowhere", "--query", "x", "nowhere.png"], "no config at"),
        (["eval", "--workdir", "nowhere"], "no config at"),
    ],
)
def test_a_mistake_ends_in_one_message(arguments, says):
    with pytest.raises(SystemExit, match=says):
        cli.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config=configs/nope.py"], "no config at 'configs/nope.py'"),
        (
            ["--config=configs/debug.py", "--config.batch_sze=3"],
            "imgtune: no setting 'batch_sze' Did you mean \"batch_size\"",
        ),
        (["--config=configs/debug.py", "--config.zz.y=3"], "no setting 'zz'"),
        (["--config=configs/debug.py", "--config.lock.imag=True"], 'Did you mean "image"'),
        (["--config=configs/debug.py", "--config.lock.image=maybe"], "lock.image"),
        (["--config=configs/debug.py", "--wrkdir=x"], "wrkdir"),
        (["--config=configs/debug.py", "--config.optim.name=adm"], "known: adamw"),
    ],
)
def test_a_mistake_in_training_ends_in_one_message(arguments, says, tmp_path):
    command = [sys.executable, "train.py", f"--workdir={tmp_path / 'run'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert says in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command",
    ["train", "cache", "bench", "eval", "embed", "search", "classify", "caption", "info"],
)
def test_every_command_has_help(command):
    code = f"from imgtune_jax.cli import main; main(['{command}', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    wanted = f"usage: imgtune {command}"
    assert wanted in done.stdout


def test_a_reader_that_has_seen_enough_is_no_error():
    code = (
        "from imgtune_jax.cli.process import clear_errors\n"
        "with clear_errors():\n"
        "    for _ in range(100_000): print('a line of a long description')\n"
    )
    command = [sys.executable, "-c", code]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()  # as `| head -1` does
    assert (child.stderr.read(), child.wait()) == (b"", 0)
