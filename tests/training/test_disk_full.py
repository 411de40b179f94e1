"""A full disk ends a run with one message, keeps what is saved, and leaves no incomplete file."""

import errno
import io
import json
import re

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from imgtune_jax import disk_space
from imgtune_jax.cli import startup
from imgtune_jax.errors import DiskFullError
from imgtune_jax.training import checkpoint, loop, metric_logger
from tests.debug_run import ROOT, losses, settings


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def disk_is_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


SETTINGS = {"total.steps": 3, "checkpoint.every.steps": 1}


def test_full_disk_while_saving_names_bytes_and_the_last_step(tmp_path, monkeypatch):
    save = ocp.CheckpointManager.save

    def fail_at_step_2(manager, step, **kwargs):
        if step == 2:
            (tmp_path / "checkpoints" / f"2{checkpoint.TMP_DIR_SUFFIX}").mkdir()
            disk_is_full()
        return save(manager, step, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", fail_at_step_2)
        with pytest.raises(DiskFullError) as error:
            loop.train(settings(**SETTINGS), tmp_path)
    assert re.fullmatch(
        r"the disk is full: the checkpoint of step 2, [\d,]+ bytes, cannot be written to "
        rf"{tmp_path}/checkpoints, which has [\d,]+ bytes free; the last saved step is 1\. Free "
        "some space, and resume the run with the same command",
        str(error.value),
    )
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]
    loop.train(settings(**SETTINGS), tmp_path)
    assert checkpoint.latest_step(tmp_path) == 3 and len(losses(tmp_path)) == 3


def test_full_disk_in_the_background_is_explained(tmp_path, monkeypatch):
    checkpointer = checkpoint.Checkpointer(tmp_path, settings().checkpoint)
    checkpointer.save(7, {"params": jnp.zeros(1000)}, {"step": 7})
    checkpointer.wait()
    leftover = tmp_path / "checkpoints" / f"7{checkpoint.TMP_DIR_SUFFIX}-1"
    leftover.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(checkpointer._manager, "wait_until_finished", disk_is_full)
        with pytest.raises(DiskFullError, match="the checkpoint of step 7, 4,000 bytes, cannot"):
            checkpointer.wait()
    assert not leftover.exists()
    checkpointer.close()


class FullFile(io.FileIO):
    """A file on a disk that has room for five more bytes."""

    def write(self, data):
        super().write(bytes(data)[:5])
        disk_is_full()


def test_full_disk_while_logging_leaves_no_part_of_a_line(tmp_path):
    config = {"wandb_project": None}
    logger = metric_logger.MetricLogger(tmp_path, start=0, total=9, batch_size=2, config=config)
    logger.log_train(1, {"loss": 1.0})
    logger._metrics.close()
    logger._metrics = FullFile(tmp_path / "metrics.jsonl", "ab")
    with pytest.raises(
        DiskFullError, match=r"a line, 31 bytes, cannot be written to .*metrics\.json"
    ):
        logger.log_train(2, {"loss": 1.0})
    logger.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]


def test_full_disk_while_logging_to_tensorboard_is_an_error(tmp_path, monkeypatch):
    """With tensorboardX.SummaryWriter, whose thread dies, the run would hang."""
    config = {"wandb_project": None}
    logger = metric_logger.MetricLogger(tmp_path, start=0, total=9, batch_size=2, config=config)
    monkeypatch.setattr(logger._tensorboard._writer, "flush", disk_is_full)
    with pytest.raises(DiskFullError, match="a TensorBoard file cannot be written"):
        logger.log_train(1, {"loss": 1.0})
    logger.close()


def test_full_disk_at_any_other_file_names_the_last_step(tmp_path, monkeypatch):
    monkeypatch.setattr("imgtune_jax.training.workdir_files.save_config", disk_is_full)
    message = f"a file of the run cannot be written to {tmp_path}/run, .*; no step is saved"
    with pytest.raises(DiskFullError, match=message):
        loop.train(settings(**SETTINGS), tmp_path / "run")


def test_command_ends_with_one_message_and_a_non_zero_status(tmp_path):
    with (
        pytest.raises(SystemExit) as exit_info,
        startup.report_user_errors(),
        disk_space.explain_full_disk(tmp_path / "absent" / "folder", "a file", wanted=12345),
    ):
        disk_is_full()
    assert str(exit_info.value).startswith("imgtune: the disk is full: a file, 12,345 bytes,")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device"), True),
        (OSError(errno.EACCES, "x"), False),
        (ValueError("x"), False),
    ],
)
def test_full_disk_is_recognized_also_as_a_cause(error, expected):
    assert disk_space.is_disk_full(error) is expected
    outer = RuntimeError("save failed")
    outer.__cause__ = error
    assert disk_space.is_disk_full(outer) is expected


def test_other_errors_are_not_explained(tmp_path):
    with pytest.raises(ValueError, match=r"^x$"), disk_space.explain_full_disk(tmp_path, "a file"):
        raise ValueError("x")
