"""The command line: help, flags, and errors as one message."""

import subprocess
import sys
from pathlib import Path

import pytest

from imgtune_jax import cli
from imgtune_jax.cli import startup
from imgtune_jax.data import TooManyBadRecordsError
from imgtune_jax.errors import NonFiniteLossError, UserError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nowhere"], "no config at nowhere"),
        (["search", "--model", "nowhere", "--query", "x", "nowhere.png"], "no image or folder at"),
        (["eval", "--workdir", "nowhere"], "no config at"),
    ],
)
def test_missing_folder_is_reported_as_one_message(arguments, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
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
        (["--config=configs/debug.py", "--config.optim.name=adm"], "adamw, adafactor"),
    ],
)
def test_bad_flag_is_reported_as_one_message(arguments, message, tmp_path):
    command = [sys.executable, "train.py", f"--workdir={tmp_path / 'run'}", *arguments]
    completed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert completed.returncode != 0
    assert message in completed.stderr and "Traceback" not in completed.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command",
    ["train", "cache", "bench", "eval", "embed", "search", "classify", "caption", "info"],
)
def test_every_command_has_help(command):
    code = f"from imgtune_jax.cli import main; main(['{command}', '--help'])"
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert f"usage: imgtune {command}" in completed.stdout


@pytest.mark.parametrize("error", [UserError, NonFiniteLossError, TooManyBadRecordsError])
def test_user_errors_end_in_one_message_and_others_keep_their_traceback(error, monkeypatch):
    monkeypatch.delenv("IMGTUNE_TRACEBACK", raising=False)
    with pytest.raises(SystemExit, match="imgtune: expected 3"), startup.report_user_errors():
        raise error("expected 3")
    with pytest.raises(ZeroDivisionError), startup.report_user_errors():
        raise ZeroDivisionError
    monkeypatch.setenv("IMGTUNE_TRACEBACK", "1")
    with pytest.raises(error, match="expected 3"), startup.report_user_errors():
        raise error("expected 3")


def test_closed_output_pipe_ends_the_process_with_status_0():
    code = (
        "from imgtune_jax.cli.startup import report_user_errors\n"
        "with report_user_errors():\n"
        "    for _ in range(100_000): print('a line of a long output')\n"
    )
    command = [sys.executable, "-c", code]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()  # as in `imgtune … | head -1`
    assert (child.stderr.read(), child.wait()) == (b"", 0)


@pytest.fixture
def installed(tmp_path):
    """Return a function that runs a command without the source checkout and returns stderr."""
    packages = tmp_path / "site-packages"
    packages.mkdir()
    (packages / "imgtune_jax").symlink_to(ROOT / "imgtune_jax")
    # None makes `import configs` fail even if the package is an editable install.
    code = (
        f"import sys; sys.path.insert(0, {str(packages)!r}); sys.modules['configs'] = None\n"
        "from imgtune_jax.cli import main; main(sys.argv[1:])"
    )

    def run(*arguments):
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stderr

    return run


def test_package_without_its_checkout_names_the_missing_folder(installed, tmp_path):
    (tmp_path / "mine.py").write_text("from configs import base\nget_config = base.get_config\n")
    for config in ("configs/debug.py", "mine.py"):
        stderr = installed("train", f"--config={config}", "--workdir=run")
        assert f"configs/ not found in {tmp_path}: part of the source checkout" in stderr
        assert "Traceback" not in stderr


def test_checkout_hint_is_given_only_for_a_missing_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = "no tar at 'corpora/emoji/seen.tar'"
    assert startup.with_checkout_hint("batch_size = 0") == "batch_size = 0"
    assert "corpora/ not found" in startup.with_checkout_hint(message)
    (tmp_path / "corpora").mkdir()
    assert startup.with_checkout_hint(message) == message
