"""Optimizers equal Optax's; learning-rate schedules; multipliers by parameter path."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imgtune_jax import config, param_tree
from imgtune_jax.training import optim

NEVER = config.Duration(None, None, None)
KERNEL = "image/blocks_0/fc1/kernel"
BIAS = "image/blocks_0/fc1/bias"


def optim_config(**changes):
    fields = dict(
        name="adamw", args={}, lr=0.1, schedule="constant", warmup=NEVER, cooldown=NEVER,
        weight_decay=0.0, clip_norm=None, layer_decay=1.0, lr_multipliers=((".*", 1.0),),
        weight_decay_multipliers=((".*/kernel", 1.0), (".*", 0.0)), ema_decay=None,
    )  # fmt: skip
    return config.OptimConfig(**{**fields, **changes})


def init_params():
    key = jax.random.key(0)
    blocks = {
        f"blocks_{i}": {"fc1": {"kernel": jax.random.normal(key, (64, 64)), "bias": jnp.ones(64)}}
        for i in range(2)
    }
    return {
        "image": {"patch_embed": {"kernel": jnp.ones((4, 4))}, **blocks, "final_norm": jnp.ones(4)}
    }


def build(cfg, total=10, warmup=0, cooldown=0):
    paths = param_tree.param_paths(init_params())
    return optim.build_optimizer(cfg, paths, total=total, warmup=warmup, cooldown=cooldown)


def train(optimizer, steps=3, grad=0.01):
    """Return the parameters after a few steps with fixed gradients."""
    params = init_params()
    state = optimizer.tx.init(params)
    grads = jax.tree.map(lambda x: grad * jnp.sin(3 * x + 1), params)
    for _ in range(steps):
        updates, state = optimizer.tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_adamw_equals_optax_adamw():
    ours = train(build(optim_config(weight_decay=0.05, args=dict(b2=0.95))))
    mask = lambda p: jax.tree_util.tree_map_with_path(lambda path, x: path[-1].key == "kernel", p)
    tx = optax.adamw(0.1, b2=0.95, weight_decay=0.05, mask=mask)
    theirs = train(optim.Optimizer(tx, lambda s: 0.1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_lion_equals_optax_lion():
    ours = train(build(optim_config(name="lion")))
    theirs = train(optim.Optimizer(optax.lion(0.1, weight_decay=0.0), lambda s: 0.1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_optimizer_decreases_a_quadratic_loss(name):
    optimizer = build(optim_config(name=name, lr=0.02, args={}), total=60)
    loss = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p)) / 1000

    @jax.jit
    def step(params, state):
        updates, state = optimizer.tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = init_params()
    state, before = optimizer.tx.init(params), loss(params)
    for _ in range(40):
        params, state = step(params, state)
    assert loss(params) < 0.8 * before


def test_adafactor_state_is_sublinear():
    state = build(optim_config(name="adafactor", args=dict(b1=None))).tx.init(init_params())
    state_size = sum(x.size for x in jax.tree.leaves(state))
    assert state_size < 0.2 * sum(x.size for x in jax.tree.leaves(init_params()))


def test_multipliers_scale_rate_and_decay_by_path():
    rules = ((r"image/blocks_0/.*", 0.0), (".*", 1.0))
    after, before = train(build(optim_config(lr_multipliers=rules))), init_params()
    assert np.array_equal(
        after["image"]["blocks_0"]["fc1"]["kernel"], before["image"]["blocks_0"]["fc1"]["kernel"]
    )
    assert not np.array_equal(
        after["image"]["blocks_1"]["fc1"]["kernel"], before["image"]["blocks_1"]["fc1"]["kernel"]
    )
    decayed = train(build(optim_config(weight_decay=0.5)), grad=0.0)
    np.testing.assert_allclose(decayed["image"]["final_norm"], before["image"]["final_norm"])
    kernel = before["image"]["blocks_0"]["fc1"]["kernel"]
    np.testing.assert_allclose(
        decayed["image"]["blocks_0"]["fc1"]["kernel"], kernel * 0.95**3, rtol=1e-5
    )


def test_layer_decay_is_a_power_of_the_distance_from_the_output():
    paths = [
        *param_tree.param_paths(init_params()), "image_head/kernel", "text/blocks_0/fc1/kernel"
    ]  # fmt: skip
    multipliers = optim.layer_decay(0.5, paths)
    assert multipliers["image/patch_embed/kernel"] == 0.5**3
    assert multipliers[KERNEL] == multipliers[BIAS] == 0.5**2
    assert multipliers["image/blocks_1/fc1/bias"] == 0.5
    assert multipliers["image/final_norm"] == multipliers["image_head/kernel"] == 1.0
    assert multipliers["text/blocks_0/fc1/kernel"] == 0.5


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_schedule_rises_linearly_and_then_decreases(name):
    schedule = optim.make_schedule(name, lr=2.0, total=100, warmup=10, cooldown=20)
    rates = np.array([schedule(i) for i in range(100)])
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 11, rtol=1e-6)
    assert rates.argmax() == 10 and np.all(np.diff(rates[11:]) <= 1e-6)
    assert rates[-1] < 0.12


def test_constant_schedule_without_cooldown_is_constant():
    schedule = optim.make_schedule("constant", lr=2.0, total=100, warmup=0, cooldown=0)
    assert schedule(99) == 2.0


def test_rsqrt_schedule_is_inverse_square_root_after_warmup():
    schedule = optim.make_schedule("rsqrt", lr=1.0, total=1000, warmup=10, cooldown=0)
    np.testing.assert_allclose(schedule(40), np.sqrt(10 / 40), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(name="adma"), "expected one of adamw"),
        (dict(args=dict(beta=1)), "adamw takes b1"),
        (dict(schedule="cosin"), "expected one of cosine"),
        (dict(lr_multipliers=(("image/.*", 1.0), ("txet/.*", 0.0))), "txet"),
    ],
)
def test_unknown_setting_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        build(optim_config(**changes))


def test_warmup_longer_than_the_run_is_an_error():
    with pytest.raises(ValueError, match="exceed the total of 10"):
        build(optim_config(), total=10, warmup=8, cooldown=5)
