"""Numbers in a config: each has a range, and a value out of it is an error that names both."""

import dataclasses
import json

import pytest

from imgtune_jax import config, config_values, data, evals, models, objectives
from imgtune_jax.decoding import METHODS, GenerationConfig
from imgtune_jax.models.build import ModelConfig
from imgtune_jax.training import optim
from tests.debug_run import settings

NAN, INF = float("nan"), float("inf")
RETRIEVAL = dict(name="retrieval", source=dict(name="folder", path="."))
OUT_OF_RANGE = [
    ("seed", -1, "[0, 4294967295]"),
    ("batch_size", 0, "[1, inf)"),
    ("accumulation", 0, "[1, inf)"),
    ("log_every", 0, "[1, inf)"),
    ("total.steps", 0, "[1, inf)"),
    ("checkpoint.every.steps", 0, "[1, inf)"),
    ("eval_every.steps", 0, "[1, inf)"),
    ("optim.warmup.steps", -1, "[0, inf)"),
    ("checkpoint.keep_last", 0, "[1, inf)"),
    ("checkpoint.keep_best", -1, "[0, inf)"),
    ("data.num_threads", -1, "[0, inf)"),
    ("data.num_workers", -1, "[0, inf)"),
    ("data.prefetch", -1, "[0, inf)"),
    ("data.max_bad_fraction", 1.5, "[0, 1]"),
    ("data.caption_weights.name", -1.0, "[0, inf)"),
    ("cache.image_views", -1, "[0, inf)"),
    ("lock.image_unlocked_layers", -1, "[0, inf)"),
    ("optim.lr", NAN, "[0, inf)"),
    ("optim.clip_norm", 0.0, "(0, inf)"),
    ("optim.clip_norm", INF, "(0, inf)"),
    ("optim.ema_decay", 1.0, "[0, 1)"),
    ("optim.layer_decay", 0.0, "(0, 1]"),
    ("optim.args.b2", 1.0, "[0, 1)"),
    ("optim.lr_multipliers", ((".*", -1.0),), "[0, inf)"),
    ("objectives.softmax.weight", -1.0, "[0, inf)"),
    ("model.image_std", (1.0, 0.0, 1.0), "(0, inf)"),
    ("model.image.depth", 0, "[1, inf)"),
    ("model.image.depth", 2.5, "an integer in [1, inf)"),
    ("model.image.depth", "two", "an integer in [1, inf)"),
    ("model.text.vocab_size", True, "an integer in [1, inf)"),
    ("model.text.dropout", 1.0, "[0, 1)"),
    ("tokenizer.length", 0, "[1, inf)"),
    ("data.transforms", (dict(name="horizontal_flip", p=2.0),), "[0, 1]"),
    ("evals", dict(toy=dict(RETRIEVAL, ks=(0,))), "[1, inf)"),
    ("baselines", dict(toy=dict(RETRIEVAL, ks=(0,))), "[1, inf)"),
    ("evals", dict(toy=dict(decoding=dict(method=dict(top_p=NAN)))), "(0, 1]"),
]


@pytest.mark.parametrize(("key", "value", "interval"), OUT_OF_RANGE)
def test_number_out_of_range_is_an_error_that_names_key_and_range(key, value, interval):
    with pytest.raises(ValueError) as error:
        settings(**{key: value})
    (line,) = str(error.value).split("\n  ")[1:]
    assert line.startswith(f"config.{key}") and line.endswith(interval)


@pytest.mark.parametrize("key", ["model.logit_scale_init", "model.image_mean", "evals"])
def test_number_that_is_not_finite_is_an_error_also_without_a_range(key):
    value = {"model.image_mean": (1.0, NAN, 1.0), "evals": dict(toy=dict(x=INF))}.get(key, NAN)
    with pytest.raises(ValueError, match=rf"config\.{key}.* = (nan|inf); expected a finite number"):
        settings(**{key: value})


def test_all_numbers_out_of_range_are_listed():
    with pytest.raises(ValueError) as error:
        settings(**{"seed": -1, "log_every": 0, "optim.ema_decay": 2.0})
    assert str(error.value).count("expected") == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [("optim.warmup.steps", 0), ("optim.ema_decay", 0.0), ("optim.clip_norm", None),
     ("data.num_threads", 0), ("data.max_bad_fraction", 1.0), ("optim.lr", 1), ("optim.lr", 0.0)],
)  # fmt: skip
def test_value_at_the_limit_of_its_range_is_valid(key, value):
    assert config.flatten_config(settings(**{key: value}).to_dict())[key] == value


def test_saved_config_of_an_older_version_loads_with_values_that_are_errors_today(tmp_path):
    old = settings().to_dict()
    old["checkpoint"]["keep_last"] = 0
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert config.load_config(tmp_path / "config.json").checkpoint.keep_last == 0


def test_every_range_belongs_to_a_setting():
    tables = [models.TOWERS, models.HEADS, models.DECODERS, models.POOLERS, evals.EVALUATORS]
    tables += [objectives.OBJECTIVES, data.TRANSFORMS, METHODS]
    classes = [ModelConfig, data.Tokenizer, GenerationConfig, config.Config, config.Duration]
    classes += [config.LockConfig, config.DataConfig, config.CacheConfig, config.OptimConfig]
    classes += [config.CheckpointConfig, *(c for table in tables for c in table.values())]
    known = {field.name for c in classes for field in dataclasses.fields(c)}
    known |= {"lr_multipliers", "weight_decay_multipliers", "weight"}
    known |= {"b1", "b2"} | set(optim.muon.__code__.co_varnames)
    for table in (config_values.INTEGERS, config_values.NUMBERS):
        for paths in table.values():
            for path in paths:
                name = path.replace("optim.*_multipliers.*.1", "lr_multipliers").removesuffix(".*")
                assert name.rpartition(".")[2] in known, path
