"""The layer stack: scan and remat change no value and no gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax import models

SIZES = dict(width=8, depth=3, mlp_dim=16, num_heads=2)
TEXT = dict(name="text_transformer", vocab_size=11, max_length=6, **SIZES)
# XLA fuses and so rounds a scan and a loop differently. Values and gradients are of order 1.
CLOSE = dict(rtol=1e-5, atol=1e-6)


def inputs():
    rng = np.random.default_rng(0)
    text = jnp.asarray(rng.integers(0, 11, (3, 6)), jnp.int32)
    return text, jnp.asarray(np.arange(6) < np.array([6, 2, 4])[:, None])


def random_params(tower, scale=0.3):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.normal(0, scale, a.shape), jnp.float32),
        models.abstract_tower_params(tower),
    )


def value_and_gradient(tower, params, *, train=True, key=5):
    def scalar(params):
        # unsafe_rbg, since each sample from threefry takes most of a second to compile on a CPU.
        rngs = {"dropout": jax.random.key(key, impl="unsafe_rbg")}
        pooled = tower.apply({"params": params}, *inputs(), train=train, rngs=rngs).pooled
        return jnp.square(pooled).sum()

    return jax.jit(jax.value_and_grad(scalar))(params)


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), got, want)


@pytest.fixture(scope="module")
def loop():
    """Config, parameters, value and gradient of a loop over three layers, the first one frozen."""
    cfg = {**TEXT, "dropout": 0.4, "num_frozen_layers": 1}
    tower = models.build_tower(cfg)
    params = random_params(tower)
    return cfg, params, value_and_gradient(tower, params)


@pytest.mark.parametrize(
    "options", [dict(scan=True), dict(remat=True), dict(scan=True, remat=True)], ids=str
)
def test_scan_and_remat_equal_the_loop(options, loop):
    cfg, params, want = loop
    assert_close(value_and_gradient(models.build_tower({**cfg, **options}), params), want)


def test_scan_compiles_one_layer():
    """The number of products in the program does not grow with depth."""

    def num_products(depth, scan):
        tower = models.build_tower({**TEXT, "depth": depth, "scan": scan})
        run = jax.jit(lambda p: tower.apply({"params": p}, *inputs(), train=False).pooled)
        return run.lower(random_params(tower)).as_text().count("dot_general")

    assert num_products(6, True) == num_products(3, True)
    assert num_products(6, False) == 2 * num_products(3, False)


def test_scan_does_not_change_the_parameter_tree():
    trees = [
        models.abstract_tower_params(models.build_tower({**TEXT, "scan": s})) for s in (False, True)
    ]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])


@pytest.mark.parametrize("scan", [False, True])
def test_frozen_layers_run_without_dropout(scan):
    cfg = {**TEXT, "dropout": 0.5, "scan": scan}
    params = random_params(models.build_tower(cfg))

    def value(n, *, train=True, key=1):
        tower = models.build_tower({**cfg, "num_frozen_layers": n})
        rngs = {"dropout": jax.random.key(key, impl="unsafe_rbg")}
        run = jax.jit(lambda p: tower.apply({"params": p}, *inputs(), train=train, rngs=rngs))
        return np.asarray(run(params).pooled)

    evaluated = value(0, train=False)
    assert np.abs(value(2) - evaluated).max() > 1e-3
    assert np.abs(value(2) - value(2, key=2)).max() > 1e-3
    for n in (3, -1):
        np.testing.assert_allclose(value(n), evaluated, **CLOSE)


def test_no_gradient_is_computed_through_the_frozen_prefix():
    """Frozen layers have a forward loop only, the trainable ones a forward and a backward loop."""

    def num_loops(num_frozen_layers):
        fields = {"depth": 4, "num_frozen_layers": num_frozen_layers, "scan": True}
        tower = models.build_tower({**TEXT, **fields})
        params = random_params(tower)
        trainable = {k: params.pop(k) for k in ("blocks_2", "blocks_3", "final_norm")}

        def scalar(trainable):
            variables = {"params": {**params, **trainable}}
            return tower.apply(variables, *inputs(), train=True).pooled.sum()

        return jax.jit(jax.grad(scalar)).lower(trainable).as_text().count("stablehlo.while")

    assert num_loops(2) == 3
    assert num_loops(0) == 2


def test_num_frozen_layers_out_of_range_is_an_error():
    tower = models.build_tower({**TEXT, "num_frozen_layers": 4})
    with pytest.raises(ValueError, match="expected 0 to 3, or -1"):
        models.abstract_tower_params(tower)


def test_remat_reduces_memory_on_a_cpu():
    def memory(remat):
        cfg = dict(name="vit", width=32, depth=6, mlp_dim=128, num_heads=2, image_size=64)
        tower = models.build_tower(cfg | dict(remat=remat, patch_size=8, dropout=0.0))
        x = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32)
        params = jax.eval_shape(functools.partial(tower.init, train=False), jax.random.key(0), x)

        def loss(params, x):
            return jnp.square(tower.apply(params, x, train=True).pooled).mean()

        compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(remat=True) < 0.6 * memory(remat=False)
