"""Runs that fail, stop or are damaged, and go on: no checkpoint, log line or metric is lost."""

import json
import os
import shutil
import signal

import pytest

from imgtune_jax import report
from imgtune_jax.errors import ExistingFileError, NonFiniteParamsError, UserError
from imgtune_jax.evals.retrieval import Retrieval
from imgtune_jax.evals.validation_loss import ValidationLoss
from imgtune_jax.training import checkpoint, loop, run, workdir_files
from tests.debug_run import ROOT, metrics, settings

SOURCE = dict(
    name="webdataset", path="corpora/emoji/heldout.tar", image=("google.webp",),
    captions=dict(name=("name", "en")), group=("concept",),
)  # fmt: skip
TOY = dict(name="retrieval", source=SOURCE, caption_set="name")
TINY = {
    "batch_size": 16,
    "model.image": dict(name="vit", variant="mu/16", depth=1, pool="mean"),
    "model.text": dict(
        name="text_transformer", variant="mu", depth=1, vocab_size=30522, max_length=12, pool="mean"
    ),
}
CHANGES = TINY | {
    "total.steps": 4,
    "checkpoint.every.steps": 2,
    "eval_every.steps": 3,
    "evals": {"toy": TOY, "held_out": dict(TOY, name="loss")},
    "baselines": {"untrained": TOY},
}
LOGS = ("metrics.jsonl", "results.jsonl")


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a run that was not interrupted."""
    workdir = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        loop.train(settings(**CHANGES), workdir)
    return workdir


def results(workdir):
    return [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]


def assert_same_logs(workdir, unbroken):
    for name in LOGS:
        assert (workdir / name).read_bytes() == (unbroken / name).read_bytes()


def assert_no_leftovers(workdir):
    assert not [p for p in workdir.rglob("*") if "tmp" in p.name or p.suffix == ".lock"]


def call_before(monkeypatch, owner, name, action, *, call):
    """Run `action` before the given call (0, 1, …) of a function."""
    original, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append(name)
        if len(calls) == call + 1:
            action()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


def end_process():
    raise SystemExit(1)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("action", "owner", "name", "call", "steps"),
    [
        (interrupt, Retrieval, "__call__", 0, []),  # the baseline
        (interrupt, loop, "_fetch_metrics", 0, [2]),  # a training step
        (
            interrupt,
            Retrieval,
            "__call__",
            1,
            [2, 3],
        ),  # the evaluation of step 3, which is not saved
        (interrupt, ValidationLoss, "__call__", 1, [2, 4]),  # that of step 4, which is saved
        (interrupt, run, "_new_run", 0, []),  # start-up
        (end_process, loop, "_fetch_metrics", 1, []),  # before the first checkpoint
        (end_process, ValidationLoss, "__call__", 1, [2, 4]),
    ],
)
def test_interrupted_run_resumes_as_the_unbroken_one(
    tmp_path, monkeypatch, unbroken, action, owner, name, call, steps
):
    with monkeypatch.context() as patch:
        call_before(patch, owner, name, action, call=call)
        with pytest.raises(SystemExit) as error:
            loop.train(settings(**CHANGES), tmp_path)
    assert error.value.code == (130 if action is interrupt else 1)
    assert checkpoint.saved_steps(tmp_path) == steps
    assert_no_leftovers(tmp_path)
    loop.train(settings(**CHANGES), tmp_path)
    assert_same_logs(tmp_path, unbroken)


def test_failing_evaluator_costs_only_its_own_metrics(tmp_path, monkeypatch, unbroken, caplog):
    with monkeypatch.context() as patch:

        def fail(self, predictor):
            raise RuntimeError("no such host")

        patch.setattr(Retrieval, "__call__", fail)
        loop.train(settings(**CHANGES), tmp_path)
    assert checkpoint.saved_steps(tmp_path) == [2, 4]
    errors = {(r["dataset"], r["step"]): r.get("error") for r in results(tmp_path)}
    failed = {("untrained", 0), ("toy", 3), ("toy", 4)}
    assert {key for key, error in errors.items() if error == "RuntimeError: no such host"} == failed
    assert errors.keys() - failed == {("held_out", 3), ("held_out", 4)}
    assert "'toy' of debug failed at step 4: no such host" in caplog.text
    with pytest.raises(UserError, match=r"untrained \(retrieval, step 0\): RuntimeError: no such"):
        report.check_evaluations(tmp_path)
    page = report.write_report(tmp_path).read_text()
    assert "toy (debug, step 4): RuntimeError: no such host" in page and "Loss" in page
    # The same command repeats the last evaluation.
    loop.train(settings(**CHANGES), tmp_path)
    with pytest.raises(UserError) as error:
        report.check_evaluations(tmp_path)
    assert "step 3" in str(error.value) and "step 4" not in str(error.value)
    assert metrics(tmp_path)[-1] == metrics(unbroken)[-1]


def test_best_metric_saves_every_evaluated_step(tmp_path):
    best = {"checkpoint.best_metric": "val/held_out/loss", "checkpoint.keep_last": 1}
    changes = {"checkpoint.every.steps": None, "eval_every.steps": 1, "baselines": {}}
    loop.train(settings(**CHANGES | best | changes), tmp_path)
    losses = {
        r["step"]: r["val/held_out/loss"] for r in metrics(tmp_path) if "val/held_out/loss" in r
    }
    assert len(losses) == 4
    assert set(checkpoint.saved_steps(tmp_path)) == {min(losses, key=lambda s: losses[s]), 4}


def test_run_without_checkpoint_is_replaced(tmp_path, monkeypatch, unbroken):
    other = CHANGES | {"optim.lr": 0.5, "lock.image": True, "cache.path": str(tmp_path / "cache")}
    with monkeypatch.context() as patch:
        call_before(patch, loop, "_fetch_metrics", end_process, call=0)
        with pytest.raises(SystemExit):
            loop.train(settings(**other), tmp_path / "run")
    assert (tmp_path / "run" / "cache.json").exists() and list((tmp_path / "run/frozen").iterdir())
    cached = sorted(path.name for path in (tmp_path / "cache").rglob("*"))
    loop.train(settings(**CHANGES), tmp_path / "run")
    assert_same_logs(tmp_path / "run", unbroken)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in unbroken.iterdir()}
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*")) == cached


def test_saved_model_is_not_overwritten(tmp_path):
    (tmp_path / "params.safetensors").write_bytes(b"weights")
    with pytest.raises(ExistingFileError, match="holds a saved model"):
        loop.train(settings(**CHANGES), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["params.safetensors"]


def test_damaged_checkpoint_is_replaced_and_logs_are_truncated(tmp_path, unbroken, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    shutil.rmtree(workdir / "checkpoints" / "4" / "state")
    loop.train(settings(**CHANGES), workdir)
    assert "checkpoints/4: state/_METADATA is missing" in caplog.text
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"2", "4"}
    assert (workdir / "checkpoints" / "4" / "state" / "_METADATA").exists()
    assert_same_logs(workdir, unbroken)


def test_only_damaged_checkpoints_stop_the_run_before_anything_is_written(tmp_path, unbroken):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    for step in (2, 4):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "state")
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="no checkpoint can be read"):
        loop.train(settings(**CHANGES), workdir)
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()} == before


def test_state_that_is_not_finite_is_not_saved(tmp_path):
    """The loss of step 1 is finite, but its update is not."""
    changes = TINY | {"optim.lr": 1e39, "total.steps": 1}
    with pytest.raises(NonFiniteParamsError, match=r"not finite after step 1.*a new --workdir"):
        loop.train(settings(**changes), tmp_path)
    assert checkpoint.saved_steps(tmp_path) == []
    assert len(metrics(tmp_path)) == 1


def test_second_run_in_a_folder_is_refused(tmp_path, monkeypatch):
    errors = []

    def train_again():
        with pytest.raises(UserError, match="only one process may") as error:
            loop.train(settings(**CHANGES), tmp_path)
        errors.append(error)

    call_before(monkeypatch, loop, "_fetch_metrics", train_again, call=0)
    loop.train(settings(**TINY, **{"total.steps": 1}), tmp_path)
    assert errors and len(metrics(tmp_path)) == 1
    assert not (tmp_path / workdir_files.RESULTS).exists()
