"""Resuming, sharding and gradient accumulation do not change the losses of a captioning run."""

import signal

import numpy as np
import pytest

from imgtune_jax.training import loop
from tests.debug_run import ROOT, losses, metrics, settings, signal_after, start

NO_DROPOUT = {
    f"model.{component}": dict(settings("coca").model[component], dropout=0.0)
    for component in ("image", "decoder")
}


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The workdir of a run on one device."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    assert start(workdir, kind="coca").wait(timeout=600) == 0
    return workdir


def test_killed_and_resumed_run_equals_uninterrupted_run(uninterrupted, tmp_path):
    process = start(tmp_path, kind="coca")
    assert signal_after(process, tmp_path, 13, signal.SIGKILL) == -9
    assert start(tmp_path, kind="coca").wait(timeout=600) == 0
    resumed = (tmp_path / "metrics.jsonl").read_bytes()
    assert resumed == (uninterrupted / "metrics.jsonl").read_bytes()


def test_both_terms_are_reported_and_perplexity_is_exp_of_the_caption_loss(uninterrupted):
    for line in metrics(uninterrupted):
        np.testing.assert_allclose(
            line["train/perplexity"], np.exp(line["train/captioning"]), rtol=1e-5
        )
        assert {"train/softmax", "train/token_accuracy"} <= line.keys()
    assert losses(uninterrupted)[-1] < losses(uninterrupted)[0]


def test_loss_curve_does_not_depend_on_the_mesh(uninterrupted, tmp_path):
    """The vocabulary is sharded over two of eight devices."""
    loop.train(settings("coca", **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}), tmp_path)
    np.testing.assert_allclose(losses(tmp_path)[:20], losses(uninterrupted)[:20], rtol=1e-5)


def test_accumulated_run_equals_run_on_full_batches(tmp_path):
    """Microbatches have different numbers of tokens, and every token has the same weight."""
    changes = {**NO_DROPOUT, "total.steps": 6}
    loop.train(settings("coca", **changes), tmp_path / "full")
    loop.train(settings("coca", **changes, accumulation=4), tmp_path / "micro")
    np.testing.assert_allclose(losses(tmp_path / "micro"), losses(tmp_path / "full"), rtol=1e-5)
