"""Configs are validated whole, and every default is pinned."""

import importlib.util
import json
from pathlib import Path

import pytest
from absl import flags

from imgtune_jax import cli, config, config_history

ROOT = Path(__file__).parents[1]
# emoji.py is what configs share, not one itself
CONFIGS = [p for p in sorted((ROOT / "configs").glob("*.py")) if p.stem != "emoji"]
GOLDEN = ROOT / "tests" / "golden" / "configs"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def base():
    return config.parse_config(load(ROOT / "configs" / "base.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_resolved_config_equals_its_golden_file(path):
    """A changed default is a visible diff. Refresh: python -m tests.golden.make_configs"""
    found = config.flatten_config(json.loads(json.dumps(config.parse_config(load(path)).to_dict())))
    assert found == json.loads((GOLDEN / f"{path.stem}.json").read_text())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_variant_states_only_its_difference(path):
    source = path.read_text()
    assert path.stem == "base" or ".get_config()" in source
    assert path.stem == "base" or len(source.splitlines()) <= 60
    assert '"""' in source[:3], "a config's docstring says command, time and expected result"


@pytest.mark.parametrize("given", [["--config.lock.image=False"], ["--noconfig.lock.image"]])
def test_every_group_can_be_set_on_the_command_line(given):
    """`lock` too, though ConfigDict has a method of that name."""
    values = flags.FlagValues()
    command = ["train.py", f"--config={ROOT / 'configs' / 'lit_emoji.py'}", "--workdir=w"]
    rest = cli.parse_flags(values, [*command, *given, "--config.optim.lr=0.5", "rest"])
    found = config.parse_config(values.config)
    plain = config.parse_config(load(ROOT / "configs" / "lit_emoji.py"))
    assert rest == ["train.py", "rest"] and values.workdir == "w"
    assert config.differences(plain, found) == {
        "lock.image": (True, False),
        "optim.lr": (0.001, 0.5),
    }


def test_json_round_trip_is_the_identity(tmp_path):
    config.save_config(base(), tmp_path / "config.json")
    assert config.load_config(tmp_path / "config.json") == base()


def test_a_run_saved_before_a_key_existed_is_read(tmp_path):
    saved = base().to_dict()
    for group, key, _ in config_history.ADDED_KEYS:
        del saved[group][key]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert config.load_config(tmp_path / "config.json") == base()


def test_all_wrong_keys_are_named_together():
    raw = base().to_dict()
    raw["lock"]["imag"] = True
    raw["seed"] = "zero"
    raw["optim"]["lr"] = None
    del raw["mesh"]
    with pytest.raises(ValueError) as error:
        config.parse_config(raw)
    text = str(error.value)
    assert "config.lock.imag is unknown; did you mean 'image'" in text
    assert "config.seed = 'zero' (str); wanted int" in text
    assert "config.optim.lr = None" in text
    assert "config.mesh is missing" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["total"].update(steps=5), "set one of steps, epochs, examples"),
        (lambda c: c["total"].update(epochs=None), "config.total has no length"),
        (lambda c: c.update(accumulation=7), "does not divide"),
        (lambda c: c.update(objectives={}), "objectives is empty"),
        (lambda c: c["cache"].update(image_views=-1), "not negative"),
        (lambda c: c["optim"]["warmup"].update(steps=-1), "not negative"),
    ],
)
def test_contradictions_are_refused(change, says):
    raw = base().to_dict()
    change(raw)
    with pytest.raises(ValueError, match=says):
        config.parse_config(raw)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (config.Duration(7, None, None), 7),
        (config.Duration(None, 2.0, None), 25),
        (config.Duration(None, None, 800), 100),
        (config.Duration(None, None, 1), 1),
        (config.Duration(None, None, None), None),
    ],
)
def test_durations_in_steps(duration, steps):
    assert duration.in_steps(batch_size=8, num_examples=100) == steps


def test_differences_names_dotted_keys():
    raw = base().to_dict()
    raw["optim"]["lr"] = 0.5
    assert config.differences(base(), config.parse_config(raw)) == {"optim.lr": (0.001, 0.5)}
