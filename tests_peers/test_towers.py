"""BERT equals the installed transformers, and ResNet torchvision, with random weights."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from imgtune_jax import interop, models
from imgtune_jax.interop import huggingface, weight_map
from tests.golden import interop_resnet


def numpy_state(model):
    return {name: x.numpy() for name, x in model.state_dict().items()}


@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_bert_equals_transformers(act, pool, tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=12,
        hidden_act=act,
        initializer_range=0.2,
    )
    theirs = BertModel(config).eval()
    np.savez(tmp_path / "bert.npz", **numpy_state(theirs))
    cfg = dict(name="bert", width=24, depth=3, num_heads=4, mlp_dim=40, vocab_size=50)
    cfg |= dict(max_length=12, pool=pool, act={"gelu_new": "gelu_tanh"}.get(act, act))
    params = interop.load_tower(dict(format="bert", path=tmp_path / "bert.npz"), cfg)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, (4, 9))
    mask = np.arange(9) < np.array([9, 5, 1, 7])[:, None]
    with torch.no_grad():
        hidden = theirs(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
    mean = np.stack([row[valid].mean(0) for row, valid in zip(hidden, mask, strict=True)])
    tower = models.build_tower(cfg)
    ids, mask = jnp.asarray(ids, jnp.int32), jnp.asarray(mask)
    output = tower.apply({"params": params}, ids, mask, train=False)
    np.testing.assert_allclose(output.tokens[mask], hidden[mask], rtol=1e-4, atol=1e-5)
    expected = mean if pool == "mean" else hidden[:, 0]
    np.testing.assert_allclose(output.pooled, expected, rtol=1e-4, atol=1e-5)


def test_roberta_equals_transformers(tmp_path):
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=14,  # 12, after the two rows that are not used
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
        initializer_range=0.2,
    )
    theirs = RobertaModel(config).eval()
    theirs.save_pretrained(tmp_path)
    cfg = dict(name="bert", width=24, depth=2, num_heads=4, mlp_dim=40, vocab_size=50)
    cfg |= dict(max_length=12, norm_epsilon=1e-5)
    params = interop.load_tower(dict(format="bert", path=tmp_path), cfg)
    ids = np.random.default_rng(0).integers(2, 50, (3, 9))
    mask = np.arange(9) < np.array([9, 5, 1])[:, None]
    ids = np.where(mask, ids, 1)
    with torch.no_grad():
        hidden = theirs(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
    inputs = jnp.asarray(ids, jnp.int32), jnp.asarray(mask)
    tokens = models.build_tower(cfg).apply({"params": params}, *inputs, train=False).tokens
    np.testing.assert_allclose(tokens[mask], hidden[mask], rtol=1e-4, atol=1e-5)


def test_exported_bert_has_the_same_outputs_in_transformers():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=6,
    )
    theirs = BertModel(config, add_pooling_layer=False).eval()
    tower = models.build_tower(
        dict(name="bert", width=8, depth=2, num_heads=2, mlp_dim=16, vocab_size=20, max_length=6)
    )
    expected = models.abstract_tower_params(tower)
    params = huggingface.load_bert(numpy_state(theirs), tower, expected)
    state = weight_map.to_state_dict(params, huggingface.bert_rules(tower))
    exported = BertModel(config, add_pooling_layer=False).eval()
    state = {name: torch.from_numpy(np.array(x)) for name, x in state.items()}
    assert exported.load_state_dict(state, strict=False).unexpected_keys == []
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(exported(ids)[0], theirs(ids)[0], rtol=1e-5, atol=1e-6)


def test_resnet_equals_torchvision(tmp_path):
    from torchvision.models import resnet

    theirs = resnet.resnet50(num_classes=7).eval()
    shapes = {name: tuple(x.shape) for name, x in theirs.state_dict().items()}
    state = interop_resnet.sample_state_dict(shapes, seed=2)
    theirs.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()})
    np.savez(tmp_path / "resnet.npz", **state)
    cfg = dict(name="resnet", variant="50", num_classes=7)
    params = interop.load_tower(dict(format="resnet", path=tmp_path / "resnet.npz"), cfg)
    image = interop_resnet.sample_images(size=65)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2).copy())).numpy()
    tower = models.build_tower(cfg)
    logits = tower.apply({"params": params}, jnp.asarray(image), method="classify")
    # After 53 convolutions, the error of a logit is relative to the largest logit.
    largest = np.abs(expected).max()
    np.testing.assert_allclose(logits / largest, expected / largest, rtol=0, atol=1e-5)
