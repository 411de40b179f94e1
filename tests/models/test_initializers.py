"""Distributions of the parameters that a model samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax import models
from imgtune_jax.models import initializers

CFG = dict(
    image=dict(name="vit", variant="mu/8", depth=2),
    text=dict(name="text_transformer", width=32, depth=2, mlp_dim=64, num_heads=2, vocab_size=50),
    image_head=dict(name="mlp", hidden_dim=48),
    embed_dim=24,
    image_size=16,
    logit_bias_init=-10.0,
)


@pytest.fixture(scope="module")
def params():
    return models.build_model(CFG).init(jax.random.key(0))


@pytest.mark.parametrize(
    ("path", "std"),
    [
        ("image/blocks_0/attn/q/kernel", (2 / 64) ** 0.5),  # Xavier
        ("image/blocks_1/mlp/fc1/kernel", (2 / (32 + 128)) ** 0.5),
        ("image/patch_embed/kernel", (1 / (8 * 8 * 3)) ** 0.5),  # LeCun
        ("image/pos_embed", 32**-0.5),
        ("text/token_embed/embedding", 0.02),
        ("text_head/kernel", 32**-0.5),
    ],
)
def test_weights_are_normal_with_the_documented_deviation(path, std, params):
    x = params
    for key in path.split("/"):
        x = x[key]
    x = np.asarray(x)
    relative_error = 1 / np.sqrt(2 * x.size)  # standard error of a standard deviation
    assert abs(x.std() / std - 1) < 5 * relative_error
    assert abs(x.mean()) < 5 * std / np.sqrt(x.size)


def test_norms_start_as_identity_and_logit_parameters_as_configured(params):
    norm = params["image"]["blocks_0"]["norm1"]
    assert (norm["scale"] == 1).all() and (norm["bias"] == 0).all()
    assert (params["image"]["class_token"] == 0).all()
    np.testing.assert_allclose(params["logit_scale"], np.log(1 / 0.07), rtol=1e-6)
    assert params["logit_bias"] == -10


def test_all_matrices_are_sampled_separately(params):
    leaves = [np.ravel(x)[:8] for x in jax.tree.leaves(params) if x.size > 8 and np.std(x) > 0]
    first_values = {float(x[0] / np.std(x)) for x in leaves}
    assert len(first_values) == len(leaves)


def test_sampling_in_groups_follows_the_specs(monkeypatch):
    """A component with more elements than MAX_SAMPLE_SIZE is sampled in several calls."""
    specs = {f"w{i}": initializers.Normal(0.5).spec((40, 25)) for i in range(5)} | {
        "b": initializers.ONES.spec((3,))
    }
    monkeypatch.setattr(initializers, "MAX_SAMPLE_SIZE", 2100)
    params = initializers.sample_params(specs, jax.random.key(1))
    values = np.stack([params[f"w{i}"] for i in range(5)])
    assert abs(values.std() - 0.5) < 0.02 and len(np.unique(values)) > 4990
    np.testing.assert_array_equal(params["b"], jnp.ones(3))


def test_abstract_parameters_match_the_sampled(params):
    abstract = models.build_model(CFG).abstract_params()
    assert jax.tree.map(lambda x: x.shape, abstract) == jax.tree.map(lambda x: x.shape, params)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_the_same_key_samples_the_same_parameters(params):
    again = models.build_model(CFG).init(jax.random.key(0))
    other = models.build_model(CFG).init(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    kernels = [p["image"]["blocks_0"]["attn"]["q"]["kernel"] for p in (params, other)]
    assert (kernels[0] != kernels[1]).any()
