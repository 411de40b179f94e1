"""Towers and layers behave like any Linen module: `init`, intermediates, `jax.jvp`, use alone."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from imgtune_jax import models, param_tree
from imgtune_jax.models import (
    attention,
    bert,
    block,
    conv,
    decoder,
    efficientnet,
    heads,
    initializers,
    layers,
    pooling,
    resnet,
    text_transformer,
    vit,
)

SIZES = dict(width=16, depth=2, mlp_dim=24, num_heads=2)
TOWERS = {
    "vit": vit.ViT(image_size=8, patch_size=4, num_registers=1, pre_norm=True, **SIZES),
    "vit map": vit.ViT(image_size=8, patch_size=4, pool="attention", **SIZES),
    "text": text_transformer.TextTransformer(vocab_size=30, max_length=6, pool="class", **SIZES),
    "bert": bert.Bert(vocab_size=30, max_length=6, **SIZES),
    "efficientnet": efficientnet.EfficientNetLite(
        width_factor=0.25, depth_factor=0.3, num_classes=3, pool_stages=(5, 1)
    ),
    "resnet": resnet.ResNet(stage_sizes=(1, 1), width=16, norm="group"),
}
NAMES = pytest.mark.parametrize("name", TOWERS)


def key(seed=0):
    # unsafe_rbg, since each sample from threefry takes most of a second to compile on a CPU.
    return jax.random.key(seed, impl="unsafe_rbg")


def inputs(tower):
    rng = np.random.default_rng(0)
    if hasattr(tower, "max_length"):
        text = jnp.asarray(rng.integers(1, 30, (3, 6)), jnp.int32)
        return text, jnp.arange(6)[None] < jnp.asarray([6, 3, 4])[:, None]
    size = getattr(tower, "image_size", 32)
    return (jnp.asarray(rng.normal(size=(3, size, size, 3)), jnp.float32),)


@functools.cache
def params_of(name):
    tower = TOWERS[name]
    return jax.jit(tower.init)(key(), *inputs(tower))["params"]


@NAMES
def test_init_samples_the_declared_distribution_of_every_parameter(name):
    tower = TOWERS[name]
    specs = param_tree.flatten(initializers.param_specs(tower, *inputs(tower)))
    params = param_tree.flatten(params_of(name))
    assert params.keys() == specs.keys()
    for path, x in params.items():
        spec, x = specs[path], np.asarray(x)
        assert isinstance(params[path], jax.Array) and x.dtype == np.float32, path
        if not spec.std:
            np.testing.assert_array_equal(x, spec.mean, err_msg=path)
            continue
        assert abs(x.mean() - spec.mean) < 5 * spec.std / np.sqrt(x.size), path
        assert abs(x.std() / spec.std - 1) < 5 / np.sqrt(2 * x.size), path


def test_init_of_a_layer_norm_is_the_identity():
    scale_and_bias = params_of("vit")["blocks_1"]["norm1"]
    np.testing.assert_array_equal(scale_and_bias["scale"], 1)
    np.testing.assert_array_equal(scale_and_bias["bias"], 0)


def test_init_samples_each_layer_separately():
    kernels = [params_of("vit")[f"blocks_{i}"]["attn"]["q"]["kernel"] for i in range(2)]
    assert kernels[0][0, 0] != kernels[1][0, 0]


def test_init_of_a_tower_has_the_same_shapes_as_init_of_a_model():
    for name in ("vit", "text"):
        model = models.build_model(
            dict(
                image=dict(name="vit", patch_size=4, num_registers=1, pre_norm=True, **SIZES),
                text=dict(
                    name="text_transformer", vocab_size=30, max_length=6, pool="class", **SIZES
                ),
                embed_dim=8,
                image_size=8,
            )
        )
        component = "image" if name == "vit" else "text"
        shapes = jax.tree.map(lambda x: x.shape, params_of(name))
        assert shapes == jax.tree.map(lambda x: x.shape, model.abstract_params()[component])


def apply_with_intermediates(tower, params, **options):
    run = functools.partial(tower.apply, capture_intermediates=True, **options)
    output, state = jax.jit(run)({"params": params}, *inputs(tower))
    return output, state["intermediates"]


@pytest.mark.parametrize("options", [{}, dict(scan=True), dict(remat=True)], ids=str)
def test_intermediates_have_the_output_of_every_block(options):
    tower, params = TOWERS["vit"].clone(**options), params_of("vit")
    output, intermediates = apply_with_intermediates(tower, params)
    assert {name for name in intermediates if name.startswith("blocks_")} == {
        f"blocks_{i}" for i in range(tower.depth)
    }
    layer = tower.block()
    x = intermediates["pre_norm"]["__call__"][0]
    for i in range(tower.depth):
        x = layer.apply({"params": params[f"blocks_{i}"]}, x)
        np.testing.assert_allclose(
            intermediates[f"blocks_{i}"]["__call__"][0], x, rtol=1e-5, atol=1e-5
        )
    assert "fc1" in intermediates["blocks_1"]["mlp"]
    want = tower.apply({"params": params}, *inputs(tower))
    np.testing.assert_allclose(output.pooled, want.pooled, rtol=1e-5, atol=1e-5)


def test_intermediates_do_not_change_dropout():
    tower, params = TOWERS["text"].clone(dropout=0.5, num_frozen_layers=1), params_of("text")
    options = dict(train=True, rngs={"dropout": key(1)})
    output, _ = apply_with_intermediates(tower, params, **options)
    want = jax.jit(functools.partial(tower.apply, **options))({"params": params}, *inputs(tower))
    np.testing.assert_allclose(output.pooled, want.pooled, rtol=1e-5, atol=1e-5)
    other = tower.apply({"params": params}, *inputs(tower), train=True, rngs={"dropout": key(2)})
    assert np.abs(other.pooled - want.pooled).max() > 1e-2


X = jnp.asarray(np.random.default_rng(2).normal(size=(2, 5, 16)), jnp.float32)
ALONE = {
    "Dense": (layers.Dense(3), X),
    "LayerNorm": (layers.LayerNorm(), X),
    "Embed": (layers.Embed(4, 3), jnp.asarray([[0, 3]])),
    "Attention": (attention.Attention(2), X),
    "MlpBlock": (block.MlpBlock(8), X),
    "Block": (block.Block(2, 8, causal=True), X),
    "MAPHead": (pooling.MAPHead(2, 8), X),
    "AttentionalPooler": (pooling.AttentionalPooler(8, 3, 2), X),
    "MlpHead": (heads.MlpHead(4, 8), X[:, 0]),
    "ConvNorm": (conv.ConvNorm(16, 3, depthwise=True), X[:, :, None]),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_layer_can_be_used_alone(name):
    module, x = ALONE[name]
    variables = module.init(key(), x)
    for y in jax.tree.leaves(module.apply(variables, x)):
        assert np.isfinite(y).all() and np.std(y) > 0


def test_train_defaults_to_false_in_every_module():
    files = (vit, bert, text_transformer, efficientnet, resnet, decoder, block, pooling, heads)
    modules = {
        cls
        for file in files
        for cls in vars(file).values()
        if isinstance(cls, type) and issubclass(cls, nn.Module)
    }
    signatures = [inspect.signature(cls.__call__) for cls in modules]
    defaults = [s.parameters["train"].default for s in signatures if "train" in s.parameters]
    assert len(defaults) >= 10 and set(defaults) == {False}


@pytest.mark.parametrize("name", [name for name in TOWERS if name != "vit map"])
def test_jvp_by_autodiff_equals_the_hand_written_gradient(name):
    tower, params = TOWERS[name], params_of(name)
    rng = np.random.default_rng(3)
    tangent = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    shape = jax.eval_shape(tower.apply, {"params": params}, *inputs(tower)).pooled.shape
    weights = jnp.asarray(rng.normal(size=shape), jnp.float32)

    def loss(tower, params):
        return (weights * tower.apply({"params": params}, *inputs(tower)).pooled).sum()

    by_hand = functools.partial(loss, tower)
    by_autodiff = functools.partial(loss, tower.clone(hand_written_gradients=False))
    want, want_gradient = jax.jit(jax.value_and_grad(by_hand))(params)
    got, got_gradient = jax.jit(jax.value_and_grad(by_autodiff))(params)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    gradients = [jax.tree.leaves(g) for g in (got_gradient, want_gradient)]
    largest = max(np.abs(g).max() for g in gradients[1])  # the gradient of a key bias alone is zero
    for x, y in zip(*gradients, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6 * largest)
    value, derivative = jax.jit(lambda p, v: jax.jvp(by_autodiff, (p,), (v,)))(params, tangent)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    products = jax.tree.map(lambda g, v: np.vdot(np.float64(g), v), want_gradient, tangent)
    scale = sum(map(abs, jax.tree.leaves(products)))  # since the terms have both signs
    np.testing.assert_allclose(derivative, sum(jax.tree.leaves(products)), atol=1e-5 * scale)


@pytest.mark.parametrize("options", [dict(scan=True, remat=True), dict(dtype=jnp.bfloat16)])
def test_linearize_works_in_a_scan_and_in_bf16(options):
    tower = TOWERS["vit"].clone(hand_written_gradients=False, **options)

    @jax.jit
    def derivative(params):
        _, pushforward = jax.linearize(
            lambda p: tower.apply({"params": p}, *inputs(tower)).pooled, params
        )
        return pushforward(params)

    assert np.isfinite(derivative(params_of("vit"))).all()
