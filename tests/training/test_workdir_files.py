"""Files in a run's folder: config.json, truncated logs, checkpoints, frozen parameters."""

import json

import jax
import numpy as np
import pytest

from imgtune_jax import config
from imgtune_jax.errors import UserError
from imgtune_jax.training import checkpoint, workdir_files
from tests.debug_run import settings


def write_lines(path, records, *, incomplete=""):
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + incomplete)


def test_written_config_is_the_same_config(tmp_path):
    workdir = tmp_path / "new" / "run"
    workdir_files.check_same_config(settings(), workdir)  # no run there yet
    workdir_files.write_config(settings(), workdir)
    assert config.load_config(workdir / "config.json") == settings()
    assert [p.name for p in workdir.iterdir()] == ["config.json"]
    workdir_files.check_same_config(settings(), workdir)


@pytest.mark.parametrize(
    "changes",
    [
        {"log_every": 7},
        {"wandb_project": "mine"},
        {"checkpoint.keep_last": 5},
        {"mesh.fsdp": 2},
        {"data.num_workers": 1},
        {"evals": dict(toy=dict(name="retrieval"))},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_mutable_keys_may_change_on_resume(tmp_path, changes):
    workdir_files.write_config(settings(), tmp_path)
    workdir_files.check_same_config(settings(**changes), tmp_path)


def test_features_may_be_cached_elsewhere_on_resume(tmp_path):
    workdir_files.write_config(settings(**{"cache.path": "here"}), tmp_path)
    workdir_files.check_same_config(settings(**{"cache.path": "elsewhere"}), tmp_path)


@pytest.mark.parametrize(("old", "new"), [(None, "/here"), ("/here", None)])
def test_caching_features_at_all_may_not_change_on_resume(tmp_path, old, new):
    workdir_files.write_config(settings(**{"cache.path": old}), tmp_path)
    with pytest.raises(ValueError, match=rf"cache\.path: {old!r} in the saved run, {new!r} now"):
        workdir_files.check_same_config(settings(**{"cache.path": new}), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.lr": 0.5}, r"optim\.lr: 0\.001 in the saved run, 0\.5 now"),
        ({"cache.dtype": "int8"}, r"cache\.dtype: 'bfloat16' in the saved run, 'int8' now"),
        (
            {"seed": 3, "batch_size": 32},
            r"batch_size: 64 in the saved run, 32 now\n  seed: 0 in the saved run, 3 now",
        ),
    ],
)
def test_other_keys_may_not_change_on_resume(tmp_path, changes, message):
    workdir_files.write_config(settings(), tmp_path)
    with pytest.raises(ValueError, match=message):
        workdir_files.check_same_config(settings(**changes), tmp_path)


def test_logs_are_truncated_after_the_last_step(tmp_path):
    for name in ("metrics.jsonl", "timing.jsonl", "results.jsonl"):
        write_lines(tmp_path / name, [{"step": n} for n in range(5)])
    workdir_files.truncate_logs(tmp_path, 2)
    for name in ("metrics.jsonl", "timing.jsonl", "results.jsonl"):
        lines = (tmp_path / name).read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    workdir_files.truncate_logs(tmp_path, -1)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_line_separator_in_a_text_does_not_truncate_the_log(tmp_path):
    line = '{"step": 1, "dataset": "a\u2028b\x85c"}\n'
    (tmp_path / "results.jsonl").write_text(line + '{"step": 2}\n', "utf-8")
    workdir_files.truncate_logs(tmp_path, 1)
    assert (tmp_path / "results.jsonl").read_text("utf-8") == line


def test_incomplete_last_line_is_dropped(tmp_path, caplog):
    write_lines(
        tmp_path / "metrics.jsonl", [{"step": 1}, {"step": 2}], incomplete='{"step": 3, "tr'
    )
    workdir_files.truncate_logs(tmp_path, 9)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert "metrics.jsonl: dropped an incomplete line" in caplog.text


def test_store_paths_are_saved_only_if_there_are_any(tmp_path):
    workdir_files.write_store_paths({}, tmp_path)
    assert not list(tmp_path.iterdir())
    workdir_files.write_store_paths({"image": "somewhere"}, tmp_path)
    assert json.loads((tmp_path / "cache.json").read_text()) == {"image": "somewhere"}


def test_saved_steps_are_those_of_complete_checkpoints(tmp_path):
    assert checkpoint.saved_steps(tmp_path) == [] and checkpoint.latest_step(tmp_path) is None
    for name in ("5", "20", "25.orbax-checkpoint-tmp-1"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint.saved_steps(tmp_path) == [5, 20] and checkpoint.latest_step(tmp_path) == 20


def test_missing_checkpoint_error_lists_the_saved_steps(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no checkpoint; saved steps: none; train"):
        checkpoint.restore_params(tmp_path, None, {})
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint of step 7; saved steps: \[5\]; choose"
    ):
        checkpoint.restore_params(tmp_path, 7, {})


def test_frozen_parameters_are_saved_once_and_restored(tmp_path):
    frozen = {"image": {"kernel": jax.numpy.arange(6.0).reshape(2, 3)}}
    target = jax.eval_shape(lambda: frozen)
    digest = checkpoint.save_frozen(tmp_path, frozen)
    saved = {p: p.stat().st_mtime_ns for p in (tmp_path / "frozen").rglob("*")}
    assert checkpoint.save_frozen(tmp_path, frozen) == digest
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "frozen").rglob("*")} == saved
    restored = checkpoint.restore_frozen(tmp_path, digest, target)
    np.testing.assert_array_equal(restored["image"]["kernel"], frozen["image"]["kernel"])
    assert checkpoint.restore_frozen(tmp_path, digest, {}) == {}


def test_altered_frozen_parameters_are_an_error(tmp_path):
    frozen = {"image": {"kernel": jax.numpy.zeros((2, 3))}}
    digest = checkpoint.save_frozen(tmp_path, frozen)
    (tmp_path / "frozen" / digest).rename(tmp_path / "frozen" / "0123")
    with pytest.raises(ValueError, match=f"has the digest {digest}; expected 0123"):
        checkpoint.restore_frozen(tmp_path, "0123", jax.eval_shape(lambda: frozen))


def test_workdir_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"file is not a folder; choose another"):
            workdir_files.check_writable(workdir)
    workdir_files.check_writable(tmp_path / "new" / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
