"""W&B is used only if the config asks for it, as one run; TensorBoard files can be read."""

import sys
import types

import pytest
from tensorboardX.proto.event_pb2 import Event

from imgtune_jax.errors import UserError
from imgtune_jax.training import loop, metric_logger
from tests.debug_run import ROOT, settings


def log_one_step(workdir, step, project):
    config = {"wandb_project": project, "seed": 0}
    logger = metric_logger.MetricLogger(
        workdir, start=step - 1, total=9, batch_size=2, config=config
    )
    logger.log_train(step, {"loss": 0.5, "acc@1": 1.0})
    logger.close()


class FakeWandb(types.ModuleType):
    """Records the arguments of `init` and the logged values."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.logged, self.num_finished = [], [], 0

    def init(self, **arguments):
        self.runs.append(arguments)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.num_finished += 1


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_is_used_only_if_the_config_names_a_project(tmp_path, wandb):
    log_one_step(tmp_path, 1, None)
    assert not wandb.runs and not list(tmp_path.glob("wandb*"))
    log_one_step(tmp_path, 2, "mine")
    assert [run["project"] for run in wandb.runs] == ["mine"]
    assert wandb.logged[0] == (2, {"train/loss": 0.5, "train/acc@1": 1.0})
    assert wandb.num_finished == 1


def test_resumed_run_is_one_run_in_wandb(tmp_path, wandb):
    for step in (1, 2):
        log_one_step(tmp_path, step, "mine")
    (tmp_path / "other").mkdir()
    log_one_step(tmp_path / "other", 1, "mine")
    first, resumed, other = wandb.runs
    assert first["id"] == resumed["id"] != other["id"]
    assert all(run["resume"] == "allow" for run in wandb.runs)


@pytest.fixture
def without_wandb(tmp_path, monkeypatch):
    """No W&B is installed, but the current folder has a folder of that name, as W&B makes."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "wandb")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(tmp_path)])
        yield
    sys.modules.pop("wandb", None)


def test_folder_called_wandb_is_not_the_package(without_wandb):
    with pytest.raises(UserError, match=r"W&B is not installed; run pip install 'imgtune_jax\[wa"):
        metric_logger.import_wandb()


def test_missing_wandb_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    with pytest.raises(UserError, match=r"config\.wandb_project is set, but W&B is not installed"):
        loop.train(settings(wandb_project="mine"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def tensorboard_events(path):
    """Yield the events of a file. A record is: length u64, crc u32, bytes, crc u32."""
    data = path.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_tensorboard_file_has_all_values_and_drops_later_steps_of_an_earlier_process(tmp_path):
    log_one_step(tmp_path, 3, None)
    (path,) = (tmp_path / "tensorboard").iterdir()
    version, start, *scalars = tensorboard_events(path)
    assert version.file_version == "brain.Event:2"
    assert start.step == 3 and start.session_log.status == 1  # START: drop steps from 3 on
    values = {e.summary.value[0].tag: (e.step, e.summary.value[0].simple_value) for e in scalars}
    assert values["train/loss"] == (3, 0.5) and values["train/acc_at_1"] == (3, 1.0)
    assert "train/samples_per_second" in values
