"""The step: accumulation is exact, locking is real, sharding changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imgtune_jax import config, param_tree
from imgtune_jax.objectives.sigmoid import SigmoidLoss
from imgtune_jax.objectives.softmax import SoftmaxLoss
from imgtune_jax.partition import Partitioner, make_mesh
from imgtune_jax.training.optim import Optimizer
from imgtune_jax.training.step import loss_and_grads, make_train_step
from imgtune_jax.types import Batch, Outputs, TrainState

WIDTH = 6


def init(key):
    k = jax.random.split(key, 3)
    return {
        "image": {"blocks_0": {"fc1": {"kernel": jax.random.normal(k[0], (WIDTH, WIDTH))}}},
        "text": {"blocks_0": {"fc1": {"kernel": jax.random.normal(k[1], (WIDTH, WIDTH))}}},
        "image_head": {"kernel": jax.random.normal(k[2], (WIDTH, WIDTH))},
        "logit_scale": jnp.log(jnp.float32(10.0)),
        "logit_bias": jnp.float32(-2.0),
    }


def forward(params, batch, rng, *, noise=0.0, bias=True):
    unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)
    image = jnp.tanh(batch.image_features @ params["image"]["blocks_0"]["fc1"]["kernel"])
    image = image @ params["image_head"]["kernel"]
    image = image + noise * jax.random.normal(rng, image.shape)
    text = jnp.tanh(batch.text.astype(jnp.float32) @ params["text"]["blocks_0"]["fc1"]["kernel"])
    b = params["logit_bias"] if bias else None
    return Outputs(unit(image), unit(text), jnp.exp(params["logit_scale"]), b)


def example(n=16, seed=0):
    rng = np.random.default_rng(seed)
    return Batch(
        example_mask=jnp.asarray(np.arange(n) % 7 != 3),
        image_features=jnp.asarray(rng.normal(size=(n, WIDTH)), jnp.float32),
        text=jnp.asarray(rng.integers(-3, 4, size=(n, WIDTH)), jnp.int32),
    )


LOSSES = [(SoftmaxLoss(), False), (SigmoidLoss(), True)]


@pytest.mark.parametrize(("objective", "bias"), LOSSES)
@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulated_gradients_equal_those_of_the_whole_batch(objective, bias, accumulation):
    params, batch, rng = init(jax.random.key(0)), example(), jax.random.key(1)

    def f(params, batch, rng):
        return forward(params, batch, rng, bias=bias)

    whole = loss_and_grads(f, objective, params, batch, rng)
    parts = loss_and_grads(f, objective, params, batch, rng, accumulation=accumulation)
    np.testing.assert_allclose(parts[1], whole[1], rtol=1e-6)
    # logit_scale and logit_bias are among the parameters: peers get these k times too large
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    jax.tree.map(close, parts[0], whole[0])
    np.testing.assert_allclose(parts[3].image_emb, whole[3].image_emb, rtol=1e-5, atol=1e-6)


def test_accumulation_replays_randomness_in_its_second_pass():
    """With noise, the accumulated gradient is that of the very outputs the loss was computed on."""
    params, batch, rng = init(jax.random.key(0)), example(), jax.random.key(1)
    k = 4

    def f(params, batch, rng):
        return forward(params, batch, rng, noise=0.3)

    loss, grads = loss_and_grads(f, SigmoidLoss(), params, batch, rng, accumulation=k)[1::-1]

    def by_hand(params):
        parts = [
            f(params, jax.tree.map(lambda x, i=i: x[i::k], batch), jax.random.fold_in(rng, i))
            for i in range(k)
        ]
        interleave = lambda *xs: jnp.stack(xs, 1).reshape(-1, *xs[0].shape[1:])
        image = interleave(*[p.image_emb for p in parts])
        text = interleave(*[p.text_emb for p in parts])
        outputs = Outputs(image, text, parts[0].logit_scale, parts[0].logit_bias)
        return SigmoidLoss()(outputs, batch)[0]

    wanted_loss, wanted = jax.value_and_grad(by_hand)(params)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), grads, wanted)


def sgd(lr=0.1):
    return Optimizer(optax.sgd(lr), lambda step: jnp.float32(lr))


def test_locked_parameters_get_no_gradient_and_no_optimizer_state():
    params, batch = init(jax.random.key(0)), example()
    is_frozen = {p: p.startswith("image/") for p in param_tree.param_paths(params)}
    trainable, frozen = param_tree.split(params, is_frozen)
    optimizer = Optimizer(optax.adam(0.1), lambda step: jnp.float32(0.1))
    s = TrainState(jnp.int32(0), trainable, optimizer.tx.init(trainable))
    step = make_train_step(forward, SigmoidLoss(), optimizer, key=jax.random.key(0))
    out, _ = jax.jit(step)(s, frozen, batch)
    assert not any("image/blocks" in p for p in param_tree.param_paths(out.params))
    shapes = [x.size for x in jax.tree.leaves(out.opt_state)]
    assert sum(shapes) == 2 * sum(x.size for x in jax.tree.leaves(trainable)) + 1
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), out.params, trainable)
    assert all(jax.tree.leaves(moved))
    # no gradient of it is even computed: the loss does not differ in what it returns for them
    whole = param_tree.merge(out.params, frozen)
    assert whole["image"] is not None
    np.testing.assert_array_equal(
        whole["image"]["blocks_0"]["fc1"]["kernel"], params["image"]["blocks_0"]["fc1"]["kernel"]
    )


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_one_and_eight_devices_take_the_same_steps(mesh):
    params = init(jax.random.key(0))
    step = make_train_step(forward, SigmoidLoss(), sgd(), key=jax.random.key(0), accumulation=2)

    def losses(partitioner):
        batch = jax.tree.map(lambda x: jax.device_put(x, partitioner.by_batch), example())
        placed = jax.tree.map(jax.device_put, params, partitioner.shardings(params))
        s = TrainState(jnp.int32(0), placed, sgd().tx.init(placed))
        jitted, out = jax.jit(step), []
        for _ in range(5):
            s, metrics = jitted(s, {}, batch)
            out.append(float(metrics["loss"]))
        return out

    one = Partitioner(make_mesh(config.MeshConfig(1, 1, 1), jax.devices()[:1]))
    many = Partitioner(make_mesh(config.MeshConfig(*mesh)))
    np.testing.assert_allclose(losses(many), losses(one), rtol=1e-5)


def test_ema_follows_its_recurrence():
    params, batch = init(jax.random.key(0)), example()
    step = make_train_step(forward, SigmoidLoss(), sgd(), key=jax.random.key(0), ema_decay=0.9)
    s = TrainState(jnp.int32(0), params, sgd().tx.init(params), params)
    out, _ = jax.jit(step)(s, {}, batch)
    wanted = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, params, out.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), out.ema_params, wanted)


def test_randomness_depends_on_the_step_alone():
    params, batch = init(jax.random.key(0)), example()

    def noisy(params, batch, rng):
        return forward(params, batch, rng, noise=0.5)

    step = jax.jit(make_train_step(noisy, SigmoidLoss(), sgd(0.0), key=jax.random.key(3)))
    s = TrainState(jnp.int32(0), params, sgd().tx.init(params))
    s1, m0 = step(s, {}, batch)
    _, m1 = step(s1, {}, batch)
    _, again = step(dataclasses.replace(s, step=jnp.int32(1)), {}, batch)
    assert m0["loss"] != m1["loss"]
    assert m1["loss"] == again["loss"]
