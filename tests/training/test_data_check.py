"""A resumed run has the data that it was trained on, and counts bad records as an unbroken one."""

import json
import os
import shutil

import numpy as np
import pytest
from absl import flags
from PIL import Image

from imgtune_jax import cli
from imgtune_jax.data import BadRecordCounter
from imgtune_jax.errors import UserError
from imgtune_jax.training import calibrate, checkpoint, data_check, loop, run
from imgtune_jax.training.experiment import build_experiment
from tests.debug_run import ROOT, losses, settings


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def save_records(folder, n=40, bad=(3, 8, 9)):
    """Save a table of n images, of which `bad` cannot be read."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        pixels = rng.integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.bmp")
        if i in bad:
            (folder / f"{i}.bmp").write_bytes(b"no image")
    rows = [f"{i}.bmp,image number {i}" for i in range(n)]
    (folder / "t.csv").write_text("\n".join(["filepath,title", *rows]) + "\n")


def config(folder, **changes):
    """Return a config that trains on the table in `folder`, for four epochs of one step."""
    base = {
        "data.source": dict(name="folder", path=str(folder), table=str(folder / "t.csv")),
        "data.caption_weights": {"caption": 1.0},
        "batch_size": 40,
        "total": dict(steps=None, epochs=4.0, examples=None),
        "checkpoint.every.steps": 1,
        "checkpoint.keep_last": 9,
        "data.max_bad_fraction": 0.3,
        "data.max_bad_fraction_after": 40,
    }
    return settings(**(base | changes))


def record_file(workdir, step):
    return workdir / "checkpoints" / str(step) / "record" / "metadata"


def saved_record(workdir, step):
    return json.loads(record_file(workdir, step).read_text())


def drop_checkpoints_after(workdir, step):
    """Leave the workdir as if the run had been killed after `step`."""
    for saved in checkpoint.saved_steps(workdir):
        if saved > step:
            shutil.rmtree(workdir / "checkpoints" / str(saved))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with "data", of which three of 40 records are bad, and a "run" of four steps."""
    folder = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        save_records(folder / "data")
        loop.train(config(folder / "data"), folder / "run")
    return folder


@pytest.fixture
def trained(original):
    """(folder of the data, workdir), restored after the test: the config has absolute paths."""
    shutil.copytree(original, original.with_name("backup"))
    yield original / "data", original / "run"
    shutil.rmtree(original)
    original.with_name("backup").rename(original)


def resume(data, workdir, **options):
    """Build the resumed run, without training; return its experiment."""
    with run.open_run(build_experiment(config(data)), workdir, **options) as resumed:
        return resumed.experiment


def test_resuming_on_a_grown_table_is_refused_unless_allowed(trained, caplog):
    data, workdir = trained
    old = saved_record(workdir, 4)["data"]
    assert old["num_records"] == 40 and old["paths"] == [str(data), str(data / "t.csv")]
    files = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    save_records(data, 80)
    with pytest.raises(UserError) as error:
        resume(data, workdir)
    message = str(error.value)
    assert "num_records: 40 in the saved run, 80 now" in message
    assert f"fingerprint: {old['fingerprint']} in the saved run, " in message
    assert "paths" not in message and "--allow_changed_data" in message
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == files

    experiment = resume(data, workdir, allow_changed_data=True)
    assert "steps in all: 4 in the saved run, 8 now" in caplog.text
    assert experiment.step_counts.total == 8, "four epochs of the new data"
    assert data_check.data_record(experiment)["num_records"] == 80


def test_resuming_on_other_data_of_equal_length_is_refused(trained):
    data, workdir = trained
    table = (data / "t.csv").read_text()
    (data / "t.csv").write_text(table.replace("image number 7\n", "image number 8\n"))
    with pytest.raises(UserError, match=r"trained on:\n  fingerprint: \w+ in the saved run, \w+ "):
        resume(data, workdir)


def test_resuming_on_touched_data_is_allowed(trained, caplog):
    data, workdir = trained
    for path in data.iterdir():
        os.utime(path, (1, 1))
    resume(data, workdir)
    assert "training data" not in caplog.text


def test_run_whose_checkpoint_records_no_data_is_resumed(trained, caplog):
    data, workdir = trained
    record = saved_record(workdir, 4)
    del record["data"]
    record_file(workdir, 4).write_text(json.dumps(record))
    save_records(data, 80)
    with caplog.at_level("INFO", logger="imgtune_jax.training"):
        resume(data, workdir)
    assert "does not record its training data" in caplog.text


def test_paths_of_a_mixture_are_recorded(tmp_path):
    sources = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        save_records(folder)
        sources.append(dict(name="folder", path=str(folder), table=str(folder / "t.csv")))
    mixture = dict(name="mixture", sources=tuple(sources))
    experiment = build_experiment(config(tmp_path, **{"data.source": mixture}))
    paths = [str(tmp_path / p) for p in ("a", "a/t.csv", "b", "b/t.csv")]
    assert data_check.data_record(experiment)["paths"] == paths


def test_train_command_has_the_switch():
    values = flags.FlagValues()
    command = ["train.py", f"--config={ROOT / 'configs' / 'debug.py'}", "--workdir=w"]
    cli.parse_flags(values, [*command, "--allow_changed_data"], switches=("allow_changed_data",))
    assert values.allow_changed_data is True


def test_resumed_run_equals_an_unbroken_one_with_its_counts_of_bad_records(trained):
    data, workdir = trained
    unbroken = {step: saved_record(workdir, step) for step in (1, 2, 3, 4)}
    assert unbroken[4]["bad_records"] == {"seen": 160, "not_an_image": 12}
    unbroken_losses = losses(workdir)
    drop_checkpoints_after(workdir, 2)
    loop.train(config(data), workdir)
    assert {step: saved_record(workdir, step) for step in (1, 2, 3, 4)} == unbroken
    np.testing.assert_array_equal(losses(workdir), unbroken_losses)


def test_limit_of_bad_records_applies_to_the_total(trained):
    """6 of the first 80 records are bad, and 33 of the next 40."""
    data, workdir = trained
    drop_checkpoints_after(workdir, 2)
    for i in range(10, 40):
        (data / f"{i}.bmp").write_bytes(b"no image")
    experiment = build_experiment(config(data))
    message = r"^39 of 120 records are bad \(32\.5%, allowed 30\.0%\): 39 not_an_image \(such as "
    with (
        run.open_run(experiment, workdir, allow_changed_data=True) as resumed,
        pytest.raises(UserError, match=message),
    ):
        next(resumed.batches)


def test_limit_can_be_exceeded_by_records_of_an_earlier_process_only():
    counter = BadRecordCounter.from_summary({"seen": 100, "bad_utf8": 50}, 0.1, 10)
    with pytest.raises(UserError, match=r"^50 of 101 records are bad .*: 50 bad_utf8\. Repair"):
        counter.add(1, [])


def test_records_that_calibration_reads_ahead_are_not_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "MAX_EXAMPLES", 120)
    save_records(tmp_path / "data")
    changes = {"model.image_head": dict(name="linear", standardize=True)}
    experiment = build_experiment(config(tmp_path / "data", **changes))
    with run.open_run(experiment, tmp_path / "run") as new:
        for step in (1, 2, 3, 4):
            counts = next(new.batches).bad_records
            assert counts == {"seen": 40 * step, "not_an_image": 3 * step}
