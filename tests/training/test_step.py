"""Training step: exact accumulation; frozen parameters do not train; sharding changes no value."""

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


def example_batch(n=16, seed=0):
    rng = np.random.default_rng(seed)
    return Batch(
        example_mask=jnp.asarray(np.arange(n) % 7 != 3),
        image_features=jnp.asarray(rng.normal(size=(n, WIDTH)), jnp.float32),
        text=jnp.asarray(rng.integers(-3, 4, size=(n, WIDTH)), jnp.int32),
    )


LOSSES = [(SoftmaxLoss(), False), (SigmoidLoss(), True)]  # (objective, whether it uses a bias)


@pytest.mark.parametrize(("objective", "bias"), LOSSES)
@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulated_gradients_equal_those_of_the_full_batch(objective, bias, accumulation):
    params, batch, rng = init(jax.random.key(0)), example_batch(), jax.random.key(1)

    def f(params, batch, rng):
        return forward(params, batch, rng, bias=bias)

    expected, expected_loss, _, expected_outputs = loss_and_grads(f, objective, params, batch, rng)
    grads, loss, _, outputs = loss_and_grads(
        f, objective, params, batch, rng, accumulation=accumulation
    )
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    # The parameters include logit_scale and logit_bias, whose gradients must count once.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    jax.tree.map(close, grads, expected)
    np.testing.assert_allclose(outputs.image_emb, expected_outputs.image_emb, rtol=1e-5, atol=1e-6)


def test_accumulation_repeats_the_randomness_in_its_second_pass():
    """With random noise in the outputs, the gradients belong to the outputs of the first pass."""
    params, batch, rng = init(jax.random.key(0)), example_batch(), jax.random.key(1)
    k = 4

    def f(params, batch, rng):
        return forward(params, batch, rng, noise=0.3)

    loss, grads = loss_and_grads(f, SigmoidLoss(), params, batch, rng, accumulation=k)[1::-1]

    def direct_loss(params):
        micro = [
            f(params, jax.tree.map(lambda x, i=i: x[i::k], batch), jax.random.fold_in(rng, i))
            for i in range(k)
        ]
        interleave = lambda *xs: jnp.stack(xs, 1).reshape(-1, *xs[0].shape[1:])
        image = interleave(*[outputs.image_emb for outputs in micro])
        text = interleave(*[outputs.text_emb for outputs in micro])
        outputs = Outputs(image, text, micro[0].logit_scale, micro[0].logit_bias)
        return SigmoidLoss()(outputs, batch)[0]

    expected_loss, expected = jax.value_and_grad(direct_loss)(params)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    jax.tree.map(close, grads, expected)


def sgd(lr=0.1):
    return Optimizer(optax.sgd(lr), lambda step: jnp.float32(lr))


def test_frozen_parameters_have_no_update_and_no_optimizer_state():
    params, batch = init(jax.random.key(0)), example_batch()
    is_frozen = {p: p.startswith("image/") for p in param_tree.param_paths(params)}
    trainable, frozen = param_tree.split(params, is_frozen)
    optimizer = Optimizer(optax.adam(0.1), lambda step: jnp.float32(0.1))
    state = TrainState(jnp.int32(0), trainable, optimizer.tx.init(trainable))
    step = make_train_step(forward, SigmoidLoss(), optimizer, key=jax.random.key(0))
    after, _ = jax.jit(step)(state, frozen, batch)
    assert not any("image/blocks" in p for p in param_tree.param_paths(after.params))
    sizes = [x.size for x in jax.tree.leaves(after.opt_state)]
    assert sum(sizes) == 2 * sum(x.size for x in jax.tree.leaves(trainable)) + 1
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), after.params, trainable)
    assert all(jax.tree.leaves(changed))
    merged = param_tree.merge(after.params, frozen)
    np.testing.assert_array_equal(
        merged["image"]["blocks_0"]["fc1"]["kernel"], params["image"]["blocks_0"]["fc1"]["kernel"]
    )


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_one_and_eight_devices_take_the_same_steps(mesh):
    params = init(jax.random.key(0))
    step = make_train_step(forward, SigmoidLoss(), sgd(), key=jax.random.key(0), accumulation=2)

    def losses(partitioner):
        batch = jax.tree.map(
            lambda x: jax.device_put(x, partitioner.batch_sharding), example_batch()
        )
        sharded = jax.tree.map(jax.device_put, params, partitioner.param_shardings(params))
        state = TrainState(jnp.int32(0), sharded, sgd().tx.init(sharded))
        jitted, values = jax.jit(step), []
        for _ in range(5):
            state, metrics = jitted(state, {}, batch)
            values.append(float(metrics["loss"]))
        return values

    one = Partitioner(make_mesh(config.MeshConfig(1, 1, 1), jax.devices()[:1]))
    many = Partitioner(make_mesh(config.MeshConfig(*mesh)))
    np.testing.assert_allclose(losses(many), losses(one), rtol=1e-5)


def test_ema_follows_its_recurrence():
    params, batch = init(jax.random.key(0)), example_batch()
    step = make_train_step(forward, SigmoidLoss(), sgd(), key=jax.random.key(0), ema_decay=0.9)
    state = TrainState(jnp.int32(0), params, sgd().tx.init(params), params)
    after, _ = jax.jit(step)(state, {}, batch)
    expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, params, after.params)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(close, after.ema_params, expected)


def test_randomness_depends_on_the_step_only():
    params, batch = init(jax.random.key(0)), example_batch()

    def noisy(params, batch, rng):
        return forward(params, batch, rng, noise=0.5)

    step = jax.jit(make_train_step(noisy, SigmoidLoss(), sgd(0.0), key=jax.random.key(3)))
    state = TrainState(jnp.int32(0), params, sgd().tx.init(params))
    state_1, metrics_0 = step(state, {}, batch)
    _, metrics_1 = step(state_1, {}, batch)
    _, repeated = step(dataclasses.replace(state, step=jnp.int32(1)), {}, batch)
    assert metrics_0["loss"] != metrics_1["loss"]
    assert metrics_1["loss"] == repeated["loss"]
