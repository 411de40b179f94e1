"""Flags of the commands that take a config."""

import shutil
import sys
from pathlib import Path

import pytest
from absl import flags

from imgtune_jax import cli, config
from imgtune_jax.errors import MissingFileError, UserError

ROOT = Path(__file__).parents[2]
DEBUG = f"--config={ROOT / 'configs' / 'debug.py'}"


@pytest.fixture(autouse=True)
def _import_path(monkeypatch):
    """Restore sys.path, which `parse_flags` changes, and forget the config file of other tests."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "config_config", raising=False)


def parse(*arguments):
    """Return the config of a command line."""
    values = flags.FlagValues()
    cli.parse_flags(values, ["train.py", *arguments])
    return config.parse_config(values.config)


@pytest.mark.parametrize("flag", ["--config.total.epochs=2", "--config.total.epochs 2"])
def test_a_duration_in_one_unit_replaces_the_other_units(flag):
    assert parse(DEBUG).total == config.Duration(30, None, None)
    assert parse(DEBUG, *flag.split()).total == config.Duration(None, 2.0, None)
    assert parse(DEBUG, "--config.eval_every.examples=9").eval_every.examples == 9


def test_two_units_given_by_flags_are_an_error():
    with pytest.raises(UserError, match="expected one unit"):
        parse(DEBUG, "--config.total.epochs=2", "--config.total.steps=3")


def test_none_unsets_a_key_and_empties_a_group():
    default = parse(DEBUG)
    assert default.optim.ema_decay == 0.9 and default.optim.clip_norm == 1.0
    assert default.data.transforms and default.checkpoint.every.steps == 5
    changed = parse(
        DEBUG,
        "--config.optim.ema_decay=None",
        "--config.optim.clip_norm=None",
        "--config.cache.path=None",
        "--config.checkpoint.best_metric=None",
        "--config.checkpoint.every=None",
        "--config.data.caption_weights=None",
        "--config.model.text_head=None",
    )
    assert changed.optim.ema_decay is changed.optim.clip_norm is changed.cache.path is None
    assert changed.checkpoint.best_metric is None
    assert changed.checkpoint.every == config.Duration(None, None, None)
    assert changed.data.caption_weights == changed.model["text_head"] == {}


def test_last_of_two_values_wins_over_none():
    assert parse(DEBUG, "--config.optim.ema_decay=None", "--config.optim.ema_decay=0.5") == parse(
        DEBUG, "--config.optim.ema_decay=0.5"
    )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.optim.lr=None", r"config\.optim\.lr = None .*expected float"),
        ("--config.optim=None", r"config\.optim = \{\}; expected a group with the keys name"),
        ("--config.optim.ema_deca=None", 'no setting .*Did you mean "ema_decay"'),
        ("--config.batch_size=many", "batch_size"),
        ("--config.batch_sze=3", 'no setting .*Did you mean "batch_size"'),
        ("--config.name.x=None", "is not a key of a group"),
    ],
)
def test_flag_that_does_not_fit_the_config_is_a_user_error(flag, message):
    with pytest.raises(UserError, match=message) as error:
        parse(DEBUG, flag)
    assert "Traceback" not in str(error.value)


def test_missing_config_names_a_similar_file_that_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(MissingFileError, match=r"did you mean configs/debug\.py\?"):
        parse("--config=configs/debg.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError) as error:
        parse("--config=configs/debg.py")
    assert "did you mean" not in str(error.value) and "configs/debug.py" not in str(error.value)
    with pytest.raises(UserError, match="no config is given"):
        parse()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def get_config():\n    return zzz\n", r"mine\.py, line 2: NameError: name 'zzz'"),
        ("def get_config():\n    return int('x')\n", r"mine\.py, line 2: ValueError: invalid"),
        ("def get_config():\n    return 1 / 0\n", r"mine\.py, line 2: ZeroDivisionError"),
        ("def get_config():\n    open('gone')\n", r"mine\.py, line 2: FileNotFoundError"),
        ("import zzz\n", r"mine\.py, line 1: ModuleNotFoundError"),
        ("def get_config(:\n", r"mine\.py, line 1"),
        ("x = 1\n", r"mine\.py has no function get_config"),
        ("def get_config():\n    pass\n", "returned NoneType; expected a ConfigDict"),
        ("def get_config(a, b): pass\n", r"mine\.py: TypeError: get_config\(\) missing"),
    ],
)
def test_error_in_a_config_file_is_one_line_with_its_place(tmp_path, monkeypatch, code, message):
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        parse("--config=mine.py")
    assert len(str(error.value).splitlines()) == 1


def test_config_path_in_the_home_folder(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.setenv("HOME", str(tmp_path))
    for arguments in (
        ["--config=~/configs/debug.py:coca"],
        ["--config", "~/configs/debug.py:coca"],
    ):
        assert parse(*arguments).name == "debug_coca"
