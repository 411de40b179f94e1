"""The lock of a run's folder: who holds it, when it is taken over, when it is refused."""

import dataclasses
import json
import os
import socket
import subprocess
import time

import pytest

from imgtune_jax.errors import UserError
from imgtune_jax.training import workdir_lock
from imgtune_jax.training.workdir_lock import Owner, hold_lock


def write_lock(workdir, owner):
    (workdir / "train.lock").write_text(json.dumps(dataclasses.asdict(owner)))


def running_process():
    """Return the process that started the tests."""
    pid = os.getppid()
    return Owner(socket.gethostname(), pid, workdir_lock._start_time(pid))


def test_lock_names_this_process_and_is_released(tmp_path):
    workdir = tmp_path / "new" / "run"
    with hold_lock(workdir):
        owner = json.loads((workdir / "train.lock").read_text())
        assert (owner["host"], owner["pid"]) == (socket.gethostname(), os.getpid())
        assert [path.name for path in workdir.iterdir()] == ["train.lock"]
    assert not list(workdir.iterdir())


def test_lock_needs_no_links(tmp_path, monkeypatch):
    def fail(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", fail)
    with hold_lock(tmp_path):
        assert json.loads((tmp_path / "train.lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_lock_is_released_after_an_exception(tmp_path):
    with pytest.raises(SystemExit), hold_lock(tmp_path):
        raise SystemExit(130)
    assert not list(tmp_path.iterdir())


def test_lock_of_this_or_another_running_process_is_refused(tmp_path):
    with (
        hold_lock(tmp_path),
        pytest.raises(UserError, match=rf"process {os.getpid()} of this host"),
        hold_lock(tmp_path),
    ):
        pass
    write_lock(tmp_path, running_process())
    with pytest.raises(UserError, match=rf"kill {os.getppid()}"), hold_lock(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["train.lock"]


def test_lock_of_another_host_is_refused(tmp_path):
    write_lock(tmp_path, dataclasses.replace(running_process(), host="elsewhere"))
    message = r"on the host elsewhere.*delete .*train\.lock"
    with pytest.raises(UserError, match=message), hold_lock(tmp_path):
        pass


def test_lock_of_an_ended_process_is_taken_over(tmp_path):
    ended = subprocess.Popen(["true"])
    zombie = Owner(socket.gethostname(), ended.pid, "")
    while workdir_lock._start_time(ended.pid) is not None:
        time.sleep(0.01)  # until it is a zombie, for which os.kill succeeds
    write_lock(tmp_path, zombie)
    with hold_lock(tmp_path):
        assert json.loads((tmp_path / "train.lock").read_text())["pid"] == os.getpid()
    ended.wait()
    write_lock(tmp_path, zombie)
    with hold_lock(tmp_path):
        pass


def test_reused_pid_is_recognized_by_its_start_time(tmp_path):
    write_lock(tmp_path, dataclasses.replace(running_process(), started="1"))
    with hold_lock(tmp_path):
        pass
    # A system that does not tell start times cannot tell that the pid was reused.
    write_lock(tmp_path, dataclasses.replace(running_process(), started=""))
    with pytest.raises(UserError, match="only one process may"), hold_lock(tmp_path):
        pass


def test_file_that_is_no_lock_is_named(tmp_path):
    (tmp_path / "train.lock").write_text("mine")
    message = "is not a lock file of a run: 'mine'"
    with pytest.raises(UserError, match=message), hold_lock(tmp_path):
        pass
