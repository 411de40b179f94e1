"""Optimizers and schedules: equal to Optax's own, multipliers by path."""

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


def settings(**changes):
    fields = dict(
        name="adamw", args={}, lr=0.1, schedule="constant", warmup=NEVER, cooldown=NEVER,
        weight_decay=0.0, clip_norm=None, layer_decay=1.0, lr_multipliers=((".*", 1.0),),
        weight_decay_multipliers=((".*/kernel", 1.0), (".*", 0.0)), ema_decay=None,
    )  # fmt: skip
    return config.OptimConfig(**{**fields, **changes})


def params():
    key = jax.random.key(0)
    blocks = {
        f"blocks_{i}": {"fc1": {"kernel": jax.random.normal(key, (64, 64)), "bias": jnp.ones(64)}}
        for i in range(2)
    }
    return {
        "image": {"patch_embed": {"kernel": jnp.ones((4, 4))}, **blocks, "final_norm": jnp.ones(4)}
    }


def build(cfg, total=10, warmup=0, cooldown=0):
    paths = param_tree.param_paths(params())
    return optim.build_optimizer(cfg, paths, total=total, warmup=warmup, cooldown=cooldown)


def updates(optimizer, steps=3, grad=0.01):
    p = params()
    s = optimizer.tx.init(p)
    grads = jax.tree.map(lambda x: grad * jnp.sin(3 * x + 1), p)
    for _ in range(steps):
        u, s = optimizer.tx.update(grads, s, p)
        p = optax.apply_updates(p, u)
    return p


def test_adamw_equals_optax_adamw():
    ours = updates(build(settings(weight_decay=0.05, args=dict(b2=0.95))))
    mask = lambda p: jax.tree_util.tree_map_with_path(lambda path, x: path[-1].key == "kernel", p)
    tx = optax.adamw(0.1, b2=0.95, weight_decay=0.05, mask=mask)
    theirs = updates(optim.Optimizer(tx, lambda s: 0.1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_lion_equals_optax_lion():
    ours = updates(build(settings(name="lion")))
    theirs = updates(optim.Optimizer(optax.lion(0.1, weight_decay=0.0), lambda s: 0.1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_optimizer_descends(name):
    optimizer = build(settings(name=name, lr=0.02, args={}), total=60)
    loss = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p)) / 1000

    @jax.jit
    def step(p, s):
        u, s = optimizer.tx.update(jax.grad(loss)(p), s, p)
        return optax.apply_updates(p, u), s

    p = params()
    s, before = optimizer.tx.init(p), loss(p)
    for _ in range(40):
        p, s = step(p, s)
    assert loss(p) < 0.8 * before


def test_adafactor_state_is_sublinear():
    s = build(settings(name="adafactor", args=dict(b1=None))).tx.init(params())
    stored = sum(x.size for x in jax.tree.leaves(s))
    assert stored < 0.2 * sum(x.size for x in jax.tree.leaves(params()))


def test_multipliers_scale_rate_and_decay_by_path():
    rules = ((r"image/blocks_0/.*", 0.0), (".*", 1.0))
    out, before = updates(build(settings(lr_multipliers=rules))), params()
    assert np.array_equal(
        out["image"]["blocks_0"]["fc1"]["kernel"], before["image"]["blocks_0"]["fc1"]["kernel"]
    )
    assert not np.array_equal(
        out["image"]["blocks_1"]["fc1"]["kernel"], before["image"]["blocks_1"]["fc1"]["kernel"]
    )
    decayed = updates(build(settings(weight_decay=0.5)), grad=0.0)
    np.testing.assert_allclose(decayed["image"]["final_norm"], before["image"]["final_norm"])
    kernel = before["image"]["blocks_0"]["fc1"]["kernel"]
    np.testing.assert_allclose(
        decayed["image"]["blocks_0"]["fc1"]["kernel"], kernel * 0.95**3, rtol=1e-5
    )


def test_layer_decay_gives_each_layer_its_power():
    paths = [*param_tree.param_paths(params()), "image_head/kernel", "text/blocks_0/fc1/kernel"]
    found = optim.layer_decay(0.5, paths)
    assert found["image/patch_embed/kernel"] == 0.5**3
    assert found[KERNEL] == 0.5**2
    assert found["image/blocks_1/fc1/bias"] == 0.5
    assert found["image/final_norm"] == found["image_head/kernel"] == 1.0
    assert found["text/blocks_0/fc1/kernel"] == 0.5


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_schedules_warm_up_and_end(name):
    f = optim.make_schedule(name, lr=2.0, total=100, warmup=10, cooldown=20)
    rates = np.array([f(i) for i in range(100)])
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 11, rtol=1e-6)
    assert rates.argmax() == 10 and np.all(np.diff(rates[11:]) <= 1e-6)
    assert rates[-1] < 0.12


def test_constant_without_cooldown_stays():
    f = optim.make_schedule("constant", lr=2.0, total=100, warmup=0, cooldown=0)
    assert f(99) == 2.0


def test_rsqrt_is_inverse_square_root_after_warmup():
    f = optim.make_schedule("rsqrt", lr=1.0, total=1000, warmup=10, cooldown=0)
    np.testing.assert_allclose(f(40), np.sqrt(10 / 40), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(name="adma"), "known: adamw"),
        (dict(args=dict(beta=1)), "adamw takes b1"),
        (dict(schedule="cosin"), "known: cosine"),
        (dict(lr_multipliers=(("image/.*", 1.0), ("txet/.*", 0.0))), "txet"),
    ],
)
def test_wrong_settings_are_named(changes, says):
    with pytest.raises(ValueError, match=says):
        build(settings(**changes))


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="exceed the total of 10"):
        build(settings(), total=10, warmup=8, cooldown=5)
