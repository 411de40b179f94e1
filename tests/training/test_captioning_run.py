"""A run that writes captions goes through the same loop: resumed, sharded and accumulated alike."""

import signal

import numpy as np
import pytest

from imgtune_jax.training import loop
from tests.debug_run import ROOT, losses, metrics, settings, signal_after, start

NO_DROPOUT = {
    f"model.{part}": dict(settings("coca").model[part], dropout=0.0)
    for part in ("image", "decoder")
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on one device."""
    workdir = tmp_path_factory.mktemp("whole")
    assert start(workdir, kind="coca").wait(timeout=600) == 0
    return workdir


def test_a_killed_run_ends_as_if_it_had_never_been_killed(whole, tmp_path):
    process = start(tmp_path, kind="coca")
    assert signal_after(process, tmp_path, 13, signal.SIGKILL) == -9
    assert start(tmp_path, kind="coca").wait(timeout=600) == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_both_terms_are_reported_and_perplexity_is_that_of_the_nats(whole):
    for line in metrics(whole):
        np.testing.assert_allclose(
            line["train/perplexity"], np.exp(line["train/captioning"]), rtol=1e-5
        )
        assert {"train/softmax", "train/token_accuracy"} <= line.keys()
    assert losses(whole)[-1] < losses(whole)[0]


def test_one_and_eight_devices_give_one_loss_curve(whole, tmp_path):
    """With the vocabulary over two of them."""
    loop.train(settings("coca", **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}), tmp_path)
    np.testing.assert_allclose(losses(tmp_path)[:20], losses(whole)[:20], rtol=1e-5)


def test_accumulated_run_equals_whole_run(tmp_path):
    """Microbatches have different numbers of tokens; each token counts alike."""
    changes = {**NO_DROPOUT, "total.steps": 6}
    loop.train(settings("coca", **changes), tmp_path / "whole")
    loop.train(settings("coca", **changes, accumulation=4), tmp_path / "parts")
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=1e-5)
