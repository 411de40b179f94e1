"""Configs are validated, older ones still load, and golden files contain every default."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
from absl import flags

from imgtune_jax import cli, config, config_history
from imgtune_jax.errors import UserError

ROOT = Path(__file__).parents[1]
# emoji.py holds settings that several configs share
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
    """So each changed default is a visible diff. To update: python -m tests.golden.make_configs"""
    resolved = json.loads(json.dumps(config.parse_config(load(path)).to_dict()))
    golden = json.loads((GOLDEN / f"{path.stem}.json").read_text())
    assert config.flatten_config(resolved) == golden


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_states_only_its_differences_from_another(path):
    source = path.read_text()
    assert path.stem == "base" or ".get_config()" in source
    assert path.stem == "base" or len(source.splitlines()) <= 60
    assert '"""' in source[:3], "a config's docstring has command, time and expected result"


@pytest.mark.parametrize("lock_flag", [["--config.lock.image=False"], ["--noconfig.lock.image"]])
def test_every_group_can_be_set_on_the_command_line(lock_flag):
    """`lock` is tested, since ConfigDict has a method of that name."""
    values = flags.FlagValues()
    command = ["train.py", f"--config={ROOT / 'configs' / 'lit_emoji.py'}", "--workdir=w"]
    positional = cli.parse_flags(values, [*command, *lock_flag, "--config.optim.lr=0.5", "other"])
    changed = config.parse_config(values.config)
    default = config.parse_config(load(ROOT / "configs" / "lit_emoji.py"))
    assert positional == ["train.py", "other"] and values.workdir == "w"
    assert config.differences(default, changed) == {
        "lock.image": (True, False),
        "optim.lr": (0.001, 0.5),
    }


def test_saved_config_loads_as_an_equal_config(tmp_path):
    config.save_config(base(), tmp_path / "config.json")
    assert config.load_config(tmp_path / "config.json") == base()


def test_missing_config_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config at .*; expected the folder of a run"):
        config.load_config(tmp_path / "config.json")


@pytest.mark.parametrize("content", ["{", "[1]", "5", '{"name": "x"}'])
def test_file_that_is_no_saved_config_is_a_user_error(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError):
        config.load_config(tmp_path / "config.json")


EVALUATORS = {
    "classes": dict(name="scoring_classifier", normalize_length=True),
    "captions": dict(
        name="captioning",
        decoding=dict(max_new_tokens=8, min_new_tokens=2, no_repeat_ngram_size=3),
    ),
}
OLD_EVALUATORS = {
    "classes": dict(name="answers", normalise=True),
    "captions": dict(
        name="captioning", decoding=dict(max_length=8, min_length=2, no_repeat_ngram=3)
    ),
}


def config_with_every_renamed_key():
    """Return (a config as a dict, the same config as an older version saved it)."""
    new = json.loads(json.dumps(base().to_dict()))
    old = copy.deepcopy(new)
    for group, key, value in config_history.ADDED_KEYS:
        (new[group] if group else new)[key] = value
        del (old[group] if group else old)[key]
    new["data"] |= dict(caption_weights=dict(en=2.0), max_bad_fraction_after=7)
    for key in ("caption_weights", "max_bad_fraction_after"):
        del old["data"][key]
    old["data"] |= dict(captions=dict(en=2.0), min_records=7)
    new["model"]["decoder"] = dict(name="transformer", input_from="text_tower")
    old["model"]["decoder"] = dict(name="transformer", reads="tokens")
    old["model"]["image"]["depthwise"] = "shifted"
    for group in ("evals", "baselines"):
        new[group], old[group] = copy.deepcopy(EVALUATORS), copy.deepcopy(OLD_EVALUATORS)
    return new, old


def test_config_of_an_older_version_loads_as_the_current_one(tmp_path):
    new, old = config_with_every_renamed_key()
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert config.load_config(tmp_path / "config.json") == config.parse_config(new)


def test_upgrade_does_not_change_a_current_config():
    new, _ = config_with_every_renamed_key()
    upgraded = copy.deepcopy(new)
    config_history.upgrade(upgraded)
    assert upgraded == new


def test_old_key_in_a_users_config_is_an_error_that_names_the_new_one():
    _, old = config_with_every_renamed_key()
    old["data"] |= dict(prefixes={}, length_buckets=())
    with pytest.raises(ValueError) as error:
        config.parse_config(old)
    renamed = [
        ("data.captions", "data.caption_weights"),
        ("data.min_records", "data.max_bad_fraction_after"),
        ("model.decoder.reads", "model.decoder.input_from"),
    ]
    for group in ("evals", "baselines"):
        decoding = f"{group}.captions.decoding"
        renamed += [
            (f"{group}.classes.normalise", f"{group}.classes.normalize_length"),
            (f"{decoding}.max_length", f"{decoding}.max_new_tokens"),
            (f"{decoding}.min_length", f"{decoding}.min_new_tokens"),
            (f"{decoding}.no_repeat_ngram", f"{decoding}.no_repeat_ngram_size"),
        ]
    expected = [f"config.{old} is now called config.{new}; rename it" for old, new in renamed]
    expected += [
        f"config.{group}.classes.name = 'answers' is now called 'scoring_classifier'; rename it"
        for group in ("evals", "baselines")
    ]
    expected.append(
        "config.model.image.depthwise no longer exists, since the backend determines the form of "
        "the convolution; remove it"
    )
    assert str(error.value).split("\n  ")[1:] == sorted(expected, key=str(error.value).index), (
        "each error is on one line, and there are no others"
    )


def test_old_value_in_a_users_config_is_an_error_that_names_the_new_one():
    raw = base().to_dict()
    raw["model"]["decoder"] = dict(name="transformer", input_from="tokens")
    message = r"config\.model\.decoder\.input_from = 'tokens' is now called 'text_tower'"
    with pytest.raises(ValueError, match=message):
        config.parse_config(raw)


def test_error_names_all_invalid_keys():
    raw = base().to_dict()
    raw["lock"]["imag"] = True
    raw["seed"] = "zero"
    raw["optim"]["lr"] = None
    raw["checkpoint"] = 5
    del raw["mesh"]
    with pytest.raises(ValueError) as error:
        config.parse_config(raw)
    text = str(error.value)
    assert "config.lock.imag is unknown; did you mean 'image'" in text
    assert "config.seed = 'zero' (str); expected int" in text
    assert "config.optim.lr = None" in text
    assert "config.checkpoint = 5; expected a group with the keys every, keep_last" in text
    assert "config.mesh is missing" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["total"].update(steps=5), "set one of steps, epochs, examples"),
        (lambda c: c["total"].update(epochs=None), "config.total has no length"),
        (lambda c: c.update(accumulation=7), "does not divide"),
        (lambda c: c.update(objectives={}), "objectives is empty"),
    ],
)
def test_contradictory_value_is_an_error(change, message):
    raw = base().to_dict()
    change(raw)
    with pytest.raises(ValueError, match=message):
        config.parse_config(raw)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (config.Duration(7, None, None), 7),
        (config.Duration(None, 2.0, None), 25),
        (config.Duration(None, None, 800), 100),
        (config.Duration(None, None, 1), 1),
        (config.Duration(0, None, None), 0),
        (config.Duration(None, 0.0, None), 0),
        (config.Duration(None, 0.01, None), 1),
        (config.Duration(None, None, 0), 0),
        (config.Duration(None, None, None), None),
    ],
)
def test_duration_in_steps(duration, steps):
    assert duration.in_steps(batch_size=8, num_examples=100) == steps


def test_differences_have_dotted_keys():
    raw = base().to_dict()
    raw["optim"]["lr"] = 0.5
    assert config.differences(base(), config.parse_config(raw)) == {"optim.lr": (0.001, 0.5)}
