"""What a config can get wrong is an error before the first step, and before the folder exists."""

import logging
import types

import jax
import numpy as np
import pytest
import tokenizers
from PIL import Image

from imgtune_jax import interop, models
from imgtune_jax.config import parse_config
from imgtune_jax.training import loop, preflight
from imgtune_jax.training.experiment import build_experiment
from tests.debug_run import ROOT, settings
from tests.test_config import load


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """A folder with a folder `images` of 16 images, and a table of their captions and labels."""
    path = tmp_path_factory.mktemp("data")
    (path / "images").mkdir()
    rows = ["filepath,title,label"]
    for i in range(16):
        Image.fromarray(np.full((20, 20, 3), 9 * i, np.uint8)).save(path / "images" / f"{i}.png")
        rows.append(f"{i}.png,number {i},{i % 2}")
    (path / "table.csv").write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(autouse=True)
def in_data_folder(data_folder, monkeypatch):
    monkeypatch.chdir(data_folder)


def source(**fields):
    return dict(name="folder", path="images", table="table.csv", label="label") | fields


def small(kind="", **changes):
    """Return the debug config on the images of the data folder, with changes."""
    data = {"data.source": source(), "data.caption_weights": {"caption": 1.0}, "batch_size": 8}
    return settings(kind, **(data | {"total.steps": 1} | changes))


def check(config, *, is_new=True):
    return preflight.check_experiment(build_experiment(config), is_new=is_new)


def evaluator(name="retrieval", **fields):
    return dict(name=name, source=source()) | fields


def vit(**fields):
    return dict(name="vit", variant="mu/16", pool="attention") | fields


def text(**fields):
    return dict(name="text_transformer", variant="mu", vocab_size=30522, max_length=12) | fields


TEXT_CACHE = {"cache.path": "nowhere", "lock.text": True, "cache.text_views": 1}
LOCKED_LAYERS = {"lock.image": True, "lock.image_unlocked_layers": 1}
INVALID = {
    "all parameters locked": ({"lock.patterns": (".*",)}, "nothing to train"),
    "microbatch": ({"batch_size": 12}, "microbatch size 12 does not divide over 8 devices"),
    "batch above data": ({"batch_size": 24}, "16 records, so a batch repeats records, .* most 16"),
    "optimizer": ({"optim.name": "adma"}, "expected one of adamw"),
    "schedule": ({"optim.warmup.steps": 5}, "exceed the total of 1"),
    "multiplier": ({"optim.lr_multipliers": (("(", 1.0),)}, "not a regular expression"),
    "lock pattern": ({"lock.patterns": ("(",)}, "not a regular expression"),
    "objective": ({"objectives": dict(softmx=dict())}, "softmx"),
    "decoder": ({"objectives": dict(captioning=dict())}, "needs a model with a decoder"),
    "groups": ({"objectives": dict(softmax=dict(positives="group"))}, "the batch has no `group`"),
    "positives": ({"objectives": dict(softmax=dict(positives="gruop"))}, "expected pair or group"),
    "bias": ({"model.logit_bias_init": -10.0}, "logit_bias, which the softmax loss ignores"),
    "preprocess": ({"preprocess": (dict(name="resize", size=32),)}, r"preprocess .* \(32, 32, 3\)"),
    "transforms": (
        {"data.transforms": (dict(name="resize", size=32),)},
        r"config.data.transforms returns images of the shape \(32, 32, 3\); expected \(64, 64, 3\)",
    ),
    "caption set": ({"data.caption_weights": {"title": 1.0}}, "no caption sets .'title'"),
    "column": ({"data.source": source(captions={"caption": "x"})}, r"has no columns \['x'\]"),
    "text length": ({"tokenizer.length": 13}, "text of 13 tokens, .* has max_length=12"),
    "last token": (
        {"model.text": text(pool="last"), "tokenizer.length": 11},
        "padded to exactly max_length=12",
    ),
    "vocabulary": (
        {"model.text": text(vocab_size=30521)},
        "config.model.text.vocab_size = 30521, but the ids of the tokenizer are 0 to 30521",
    ),
    "prefix": ({"data.prefixes": {"caption": "a " * 12}}, "prefix .* fills all 12 tokens"),
    "cache dtype": (TEXT_CACHE | {"cache.dtype": "float8"}, "one of float32, bfloat16, int8"),
    "buckets": (TEXT_CACHE | {"data.length_buckets": (8,)}, "with cached text features"),
    "patch dropout": (
        LOCKED_LAYERS | {"model.image": vit(depth=2, patch_dropout=0.5)},
        "patch_dropout = 0.5, but the first layers of the image tower are locked",
    ),
    "missing weights": (
        {"weights.image": dict(format="params", path="missing.npz")},
        r"no weights at .*missing\.npz",
    ),
    "format": ({"weights.image": dict(format="parms", path="x")}, "'parms'; expected one of"),
    "evaluator": ({"evals": dict(toy=dict(name="retreival"))}, "retreival"),
    "baseline": ({"baselines": dict(toy=dict(name="retreival"))}, "retreival"),
    "source": (
        {"evals": dict(toy=evaluator(source=source(path="x")))},
        r"toy: path = '.*/x' is not a folder",
    ),
    "captions": ({"evals": dict(toy=evaluator(caption_set="en"))}, "evals.toy: .* the set 'en'"),
    "baseline captions": (
        {"baselines": dict(toy=evaluator(caption_set="en"))},
        "config.baselines.toy: none of the 16 records has a caption in the set 'en'",
    ),
    "captioner": ({"evals": dict(toy=evaluator("captioning"))}, "this model has no decoder"),
    "best metric": (
        {"evals": dict(a=evaluator()), "checkpoint.best_metric": "val/a/R@1"},
        "best_metric = 'val/a/R@1' is not reported by any evaluator; .*val/a/text_to_image_R@1",
    ),
    "best metric without evaluators": (
        {"checkpoint.best_metric": "val/a/R@1"},
        "expected one of: none, since config.evals is empty",
    ),
}


@pytest.mark.parametrize(("changes", "message"), INVALID.values(), ids=INVALID)
def test_invalid_config_is_an_error_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        loop.train(small(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_error_lists_all_that_is_wrong():
    changes = ["microbatch", "optimizer", "vocabulary", "captions", "missing weights"]
    config = small(**{k: v for name in changes for k, v in INVALID[name][0].items()})
    with pytest.raises(ValueError) as error:
        check(config)
    lines = str(error.value).split("\n  ")
    assert lines[0] == "the config has 5 errors:" and len(lines) == 6


def test_valid_config_passes():
    groups = source(group="label")
    evals = dict(
        curves=evaluator(use_groups=True, source=groups),
        loss=evaluator("loss"),
        classes=evaluator("zeroshot", classnames=("odd", "even"), templates="name"),
    )
    check(small(evals=evals, baselines=dict(a=evaluator()),
                **{"checkpoint.best_metric": "val/loss/softmax"}))  # fmt: skip
    caption = evaluator("captioning", decoding=dict(max_new_tokens=4), metrics=("perplexity",))
    check(small("coca", evals=dict(caption=caption, loss=evaluator("loss")),
                **{"checkpoint.best_metric": "val/loss/captioning"}))  # fmt: skip


def test_batch_above_the_data_is_valid_if_repeated_records_are_positives():
    positives = dict(softmax=dict(positives="group"))
    check(small(batch_size=24, objectives=positives, **{"data.source": source(group="label")}))


def test_two_curves_of_one_name_are_an_error():
    def stub(*names):
        return types.SimpleNamespace(metric_names=lambda: names, check=lambda *_: None)

    experiment = build_experiment(small())
    experiment.__dict__["evaluators"] = {"a": stub("b/c"), "a/b": stub("c")}
    with pytest.raises(ValueError, match="report the curves val/a/b/c; rename"):
        preflight.check_evaluators(experiment)


def saved_tower(path, **fields):
    """Save random parameters of the small image tower, and return the config of the weights."""
    model = models.build_model(small(**{"model.image": vit(**fields)}).model)
    interop.save_params(model.init(jax.random.key(0))["image"], path)
    return dict(format="params", path=str(path))


def test_weights_of_another_shape_are_an_error_that_lists_them(tmp_path):
    weights = saved_tower(tmp_path / "wide.safetensors", width=64)
    with pytest.raises(ValueError, match=r"misshaped: blocks_0/.* \(64") as error:
        loop.train(small(**{"weights.image": weights}), tmp_path / "run")
    assert str(error.value).count("misshaped") > 5 and not (tmp_path / "run").exists()


def test_checked_weights_are_those_that_a_new_run_begins_with(tmp_path):
    weights = saved_tower(tmp_path / "tower.safetensors")
    config = small(**{"weights.image": weights})
    pretrained = check(config)
    saved = interop.load_params(weights["path"])
    jax.tree.map(np.testing.assert_array_equal, pretrained, {"image": saved})
    (tmp_path / "tower.safetensors").unlink()
    assert not check(config, is_new=False), "a resumed run does not need the file"


def test_locked_tower_with_random_weights_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "imgtune_jax.training"):
        check(small(**{"lock.image": True}))
    assert "config.lock.image locks a tower with random weights" in caplog.text


def save_tokenizer(folder, template):
    """Save a tokenizer with the special tokens of T5, added by a template; return its config."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in "0123456789abcdefghijklmnopqrstuvwxyz"]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[("</s>", 1)]
    )
    backend.save(str(folder / "tokenizer.json"))
    return dict(path=str(folder), length=12, pad_id=0)


@pytest.mark.parametrize(
    ("template", "pool", "missing"),
    [("$A", "eot", "end"), ("$A </s>", "first", "begin"), ("$A </s>", "eot", None),
     ("$A", "mean", None), ("$A </s>", "class", None)],
)  # fmt: skip
def test_pooling_at_a_token_that_the_tokenizer_does_not_add_is_an_error(
    tmp_path, template, pool, missing
):
    tokenizer = save_tokenizer(tmp_path, template)
    config = small(tokenizer=tokenizer, **{"model.text": text(pool=pool)})
    if missing is None:
        check(config)
        return
    with pytest.raises(
        ValueError, match=f"pool = '{pool}' reads the output of the {missing} token"
    ):
        check(config)


def small_cap(folder, name="cap_b16", **changes):
    """Return a config of Cap with small towers, and a tokenizer without a begin token, as T5's."""
    config = load(ROOT / "configs" / f"{name}.py")
    config.tokenizer.update(
        save_tokenizer(folder, "$A </s>") | dict(length=config.tokenizer.length)
    )
    config.model.image.variant = "mu/16"
    config.model.decoder.update(variant="mu", depth=1, vocab_size=64)
    config.model.image_size = 32
    config.preprocess = (dict(name="resize", size=32),)
    config.data.source = source()
    config.update(batch_size=8, total=dict(steps=1), log_every=1)
    config.optim.warmup.steps = 0
    for key, value in changes.items():
        config[key].update(value)
    return parse_config(config)


@pytest.mark.parametrize("name", ["cap_b16", "cappa_b16"])
def test_cap_config_is_valid_for_a_tokenizer_that_adds_no_begin_token(tmp_path, name):
    """The config names T5's tokenizer, and puts the padding token before each text."""
    experiment = build_experiment(small_cap(tmp_path, name))
    preflight.check_experiment(experiment, is_new=True)
    assert experiment.tokenizer.bos_ids == (0,)
    with pytest.raises(ValueError, match=r"no begin token, .* set config\.tokenizer\.begin_token"):
        build_experiment(small_cap(tmp_path, tokenizer=dict(begin_token=None)))


def test_weights_of_a_tower_that_the_model_lacks_are_an_error(tmp_path):
    config = small_cap(tmp_path, weights=dict(text=dict(format="params", path="x.npz")))
    with pytest.raises(ValueError, match=r"weights\.text = .*, but the model has no text tower"):
        check(config)
