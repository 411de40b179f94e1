"""Checkpoints of a small state: damage, values that are not finite, retention."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax.config import CheckpointConfig, Duration
from imgtune_jax.errors import UserError
from imgtune_jax.training import checkpoint
from imgtune_jax.training.checkpoint import Checkpointer
from imgtune_jax.types import TrainState

NEVER = Duration(None, None, None)


def train_state(step, value=None):
    """Return a state whose `bias` is `step`, or `value`. The kernel is too large to be inlined."""
    kernel = jax.random.normal(jax.random.key(step), (300, 200))
    params = {"kernel": kernel, "bias": jnp.full(3, step if value is None else value, jnp.float32)}
    return TrainState(jnp.int32(step), params, {"momentum": jnp.zeros(3)}, None)


def target():
    """Return the abstract state, on one device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), train_state(0)
    )


def save(workdir, *steps, keep_last=9, best_metric=None, metrics=None, values=None):
    cfg = CheckpointConfig(NEVER, keep_last, 1, best_metric, None)
    checkpointer = Checkpointer(workdir, cfg)
    for step in steps:
        state = train_state(step, (values or {}).get(step))
        checkpointer.save(step, state, {"frozen": "", "has_ema": False, "step": step})
        if metrics:
            checkpointer.add_metrics(step, metrics[step])
    checkpointer.delete_old()
    checkpointer.close()


def empty_state(folder):
    shutil.rmtree(folder / "state")
    (folder / "state").mkdir()


def missing_state(folder):
    shutil.rmtree(folder / "state")


def missing_record(folder):
    shutil.rmtree(folder / "record")


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def missing_array(folder):
    largest_file(folder).unlink()


def truncated_array(folder):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_folder(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = [
    empty_state, missing_state, missing_record, missing_array, truncated_array, empty_folder
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_newest_checkpoint_is_named_and_passed_over(tmp_path, damage, caplog):
    save(tmp_path, 1, 2)
    damage(tmp_path / "checkpoints" / "2")
    saved = checkpoint.restore_newest(tmp_path, target())
    assert saved.step == 1 == saved.record["step"]
    np.testing.assert_array_equal(saved.state.params["kernel"], train_state(1).params["kernel"])
    params, _, step = checkpoint.restore_params(tmp_path, None, target().params)
    assert step == 1 and float(params["bias"][0]) == 1.0
    assert caplog.text.count(f"damaged checkpoint; the one before is used: {tmp_path}") == 2
    assert f"{tmp_path}/checkpoints/2: " in caplog.text
    with pytest.raises(UserError, match=r"choose another step, one of \[1\]:\n.*checkpoints/2: "):
        checkpoint.restore_params(tmp_path, 2, target().params)


def test_all_damaged_checkpoints_are_named_and_left_alone(tmp_path):
    save(tmp_path, 1, 2)
    for step in "12":
        empty_state(tmp_path / "checkpoints" / step)
    with pytest.raises(UserError, match=r"backup:\n.*checkpoints/2: .*\n.*checkpoints/1: "):
        checkpoint.restore_newest(tmp_path, target())
    assert checkpoint.saved_steps(tmp_path) == [1, 2]


def test_damaged_checkpoint_is_replaced_when_its_step_is_saved_again(tmp_path):
    save(tmp_path, 1, 3)
    empty_state(tmp_path / "checkpoints" / "3")
    checkpoint.set_damaged_aside(tmp_path, 1)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"1", "3.damaged"}
    save(tmp_path, 2, 3, keep_last=2)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"2", "3"}
    assert checkpoint.restore_newest(tmp_path, target()).step == 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_checkpoint_that_is_not_finite_is_passed_over(tmp_path, value, caplog):
    save(tmp_path, 1, 2, values={2: value})
    assert checkpoint.restore_newest(tmp_path, target()).step == 1
    assert "checkpoints/2: params/bias is not finite" in caplog.text


def test_folder_without_checkpoints_has_no_newest_one(tmp_path):
    assert checkpoint.restore_newest(tmp_path, target()) is None


def test_best_checkpoint_is_known_after_its_save(tmp_path):
    """A metric that is evaluated after the save decides what is retained."""
    losses = {1: 0.5, 2: 0.2, 3: 0.9, 4: 0.3}
    metrics = {step: {"val/toy/loss": loss} for step, loss in losses.items()}
    save(tmp_path, 1, 2, 3, 4, keep_last=1, best_metric="val/toy/loss", metrics=metrics)
    assert checkpoint.saved_steps(tmp_path) == [2, 4]


def test_last_checkpoint_that_is_the_best_replaces_the_best(tmp_path):
    metrics = {step: {"val/toy/loss": 1 / step} for step in (1, 2, 3)}
    save(tmp_path, 1, 2, 3, keep_last=1, best_metric="val/toy/loss", metrics=metrics)
    assert checkpoint.saved_steps(tmp_path) == [3]


def test_missing_best_metric_costs_no_checkpoint(tmp_path, caplog):
    metrics = {step: {"val/toy/loss": 1.0} for step in (1, 2)}
    save(tmp_path, 1, 2, best_metric="val/toy/los", metrics=metrics)
    assert checkpoint.saved_steps(tmp_path) == [1, 2]
    assert "'val/toy/los' was not reported at step 2" in caplog.text
    assert "reported: val/toy/loss" in caplog.text


def test_frozen_parameters_of_an_unsaved_run_are_deleted(tmp_path):
    first = checkpoint.save_frozen(tmp_path, {"kernel": jnp.zeros(3)})
    second = checkpoint.save_frozen(tmp_path, {"kernel": jnp.ones(3)})
    assert first != second
    assert [path.name for path in (tmp_path / "frozen").iterdir()] == [second]
    checkpoint.save_frozen(tmp_path, {})
    assert not (tmp_path / "frozen").exists()


def test_damaged_frozen_parameters_are_named(tmp_path):
    frozen = {"kernel": jnp.arange(60000.0)}
    digest = checkpoint.save_frozen(tmp_path, frozen)
    largest_file(tmp_path / "frozen" / digest).unlink()
    with pytest.raises(UserError, match=f"frozen/{digest} is damaged: .*backup"):
        checkpoint.restore_frozen(tmp_path, digest, jax.eval_shape(lambda: frozen))
