"""The contrastive losses equal loops over pairs in float64, also in blocks and on many devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax import config, objectives
from imgtune_jax.objectives import pairs
from imgtune_jax.objectives.sigmoid import SigmoidLoss
from imgtune_jax.objectives.softmax import SoftmaxLoss
from imgtune_jax.partition import Partitioner, make_mesh
from imgtune_jax.types import Batch, Outputs

LOSSES = {
    "softmax": SoftmaxLoss(),
    "softmax_group": SoftmaxLoss(positives="group"),
    "softmax_smooth": SoftmaxLoss(label_smoothing=0.1),
    "sigmoid": SigmoidLoss(),
    "sigmoid_group": SigmoidLoss(positives="group"),
}
BIAS = {"sigmoid": -3.0, "sigmoid_group": -3.0}


def make_example(n=12, d=5, *, valid=None, bias=None, seed=0):
    rng = np.random.default_rng(seed)
    image, text = rng.normal(size=(2, n, d))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    mask = np.ones(n, bool) if valid is None else valid
    outputs = Outputs(
        jnp.float32(image),
        jnp.float32(text),
        jnp.float32(7.0),
        None if bias is None else jnp.float32(bias),
    )
    group = jnp.asarray(np.arange(n) // 3, jnp.int32)
    return outputs, Batch(example_mask=jnp.asarray(mask), group=group)


def brute_force(name, outputs, batch):
    """Return the loss of `LOSSES[name]`, computed pair by pair in float64."""
    valid = np.flatnonzero(batch.example_mask)
    image = np.asarray(outputs.image_emb, np.float64)[valid]
    text = np.asarray(outputs.text_emb, np.float64)[valid]
    group = np.asarray(batch.group)[valid]
    n = len(valid)
    logits = float(outputs.logit_scale) * image @ text.T
    positive = group[:, None] == group[None] if name.endswith("group") else np.eye(n, dtype=bool)
    total = 0.0
    if name.startswith("sigmoid"):
        logits = logits + float(outputs.logit_bias)
        for i in range(n):
            for j in range(n):
                z = 1.0 if positive[i, j] else -1.0
                total += np.log1p(np.exp(-z * logits[i, j]))
        return total / n
    smoothing = 0.1 if name.endswith("smooth") else 0.0
    for i in range(n):
        for row, is_positive in ((logits[i], positive[i]), (logits[:, i], positive[:, i])):
            log_p = row - np.log(np.sum(np.exp(row)))
            target = (1 - smoothing) * is_positive / is_positive.sum() + smoothing / n
            total -= 0.5 * np.sum(target * log_p)
    return total / n


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("masked", [False, True])
def test_loss_equals_brute_force(name, masked):
    valid = np.arange(12) % 5 != 2 if masked else None
    outputs, batch = make_example(valid=valid, bias=BIAS.get(name))
    loss, metrics = LOSSES[name](outputs, batch)
    np.testing.assert_allclose(loss, brute_force(name, outputs, batch), rtol=2e-6)
    total, count = metrics["sigmoid" if "sigmoid" in name else "softmax"]
    np.testing.assert_allclose(total / count, loss, rtol=1e-6)


def central_differences(name, outputs, batch, step=1e-5):
    """Return {field: gradient of `brute_force`}, computed entry by entry in float64."""

    def differences(field):
        value = np.asarray(getattr(outputs, field), np.float64)
        grad = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            losses = []
            for sign in (1, -1):
                shifted = value.copy()
                shifted[index] += sign * step
                shifted = dataclasses.replace(outputs, **{field: shifted})
                losses.append(brute_force(name, shifted, batch))
            grad[index] = (losses[0] - losses[1]) / (2 * step)
        return grad

    fields = ["image_emb", "text_emb", "logit_scale"]
    return {f: differences(f) for f in fields + ["logit_bias"] * (outputs.logit_bias is not None)}


def loss_and_grads(name, *, mesh=None):
    """Return a jitted function (outputs, batch) -> ((loss, metrics), gradients)."""
    objective = dataclasses.replace(LOSSES[name], mesh=mesh)
    return jax.jit(jax.value_and_grad(objective, has_aux=True))


def assert_close(actual, expected, rtol=1e-6):
    # atol: a gradient near zero is a sum of terms of size 1 that cancel.
    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7)

    jax.tree.map(compare, actual, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_central_differences(name):
    outputs, batch = make_example(valid=np.arange(12) % 5 != 2, bias=BIAS.get(name))
    _, grads = loss_and_grads(name)(outputs, batch)
    for field, expected in central_differences(name, outputs, batch).items():
        # atol: a gradient is a float32 sum of terms of size 1.
        np.testing.assert_allclose(getattr(grads, field), expected, rtol=1e-5, atol=5e-7)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("n", [12, 13])  # 13: the last block is padded
def test_blocks_do_not_change_loss_gradients_or_metrics(name, n, monkeypatch):
    outputs, batch = make_example(n, valid=np.arange(n) % 5 != 2, bias=BIAS.get(name))
    one_block = loss_and_grads(name)(outputs, batch)
    monkeypatch.setattr(pairs, "BLOCK_SIZE", 2 * n)
    assert "while" in loss_and_grads(name).lower(outputs, batch).as_text()
    assert_close(loss_and_grads(name)(outputs, batch), one_block)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=["data", "fsdp", "mixed"])
def test_sharding_does_not_change_loss_gradients_or_metrics(name, sizes, monkeypatch):
    outputs, batch = make_example(16, valid=np.arange(16) % 5 != 2, bias=BIAS.get(name))
    one_block = loss_and_grads(name)(outputs, batch)
    partitioner = Partitioner(make_mesh(config.MeshConfig(*sizes)))
    by_batch, replicated = partitioner.batch_sharding, partitioner.replicated
    shard = lambda x: jax.device_put(x, by_batch if x.ndim else replicated)
    sharded = jax.tree.map(shard, (outputs, batch))
    monkeypatch.setattr(pairs, "BLOCK_SIZE", 2)  # several blocks per device
    assert_close(loss_and_grads(name, mesh=partitioner.mesh)(*sharded), one_block)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
@pytest.mark.parametrize("sharded", [False, True])
def test_memory_does_not_grow_with_the_square_of_the_batch(name, sharded, monkeypatch):
    n, d = 2048, 8
    monkeypatch.setattr(pairs, "BLOCK_SIZE", n)
    partitioner = Partitioner(make_mesh(config.MeshConfig(8, 1, 1)))
    sharding = partitioner.batch_sharding if sharded else None
    emb = jax.ShapeDtypeStruct((n, d), jnp.float32, sharding=sharding)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    outputs = Outputs(emb, emb, scalar, scalar if name in BIAS else None)
    batch = Batch(jax.ShapeDtypeStruct((n,), bool, sharding=sharding))
    program = loss_and_grads(name, mesh=partitioner.mesh if sharded else None).lower(outputs, batch)
    temporary = program.compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * n * n / 16  # half of a device's share of all logits


@pytest.mark.parametrize("name", ["softmax", "softmax_group"])
def test_batch_recall_equals_that_of_an_argmax(name, monkeypatch):
    outputs, batch = make_example(24, 3, valid=np.arange(24) % 5 != 2)
    monkeypatch.setattr(pairs, "BLOCK_SIZE", 50)
    valid = np.flatnonzero(batch.example_mask)
    scores = np.asarray(outputs.image_emb)[valid] @ np.asarray(outputs.text_emb)[valid].T
    positive_id = valid if name == "softmax" else np.asarray(batch.group)[valid]
    _, metrics = LOSSES[name](outputs, batch)
    for direction, s in (("image_to_text", scores), ("text_to_image", scores.T)):
        hits, count = metrics[f"batch_{direction}_R@1"]
        assert hits == np.sum(positive_id[s.argmax(1)] == positive_id) and count == len(valid)
        assert 0 < hits < count


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_ties_go_to_the_first_example(blocks, sharded, monkeypatch):
    outputs, batch = make_example(16)
    outputs = jax.tree.map(jnp.ones_like, outputs)
    if blocks:
        monkeypatch.setattr(pairs, "BLOCK_SIZE", 2)
    mesh = make_mesh(config.MeshConfig(8, 1, 1)) if sharded else None
    (_, metrics), _ = loss_and_grads("softmax", mesh=mesh)(outputs, batch)
    assert metrics["batch_image_to_text_R@1"][0] == metrics["batch_text_to_image_R@1"][0] == 1


@pytest.mark.parametrize("name", LOSSES)
def test_masked_rows_affect_neither_loss_nor_gradient(name):
    valid = np.arange(12) < 9
    outputs, batch = make_example(valid=valid, bias=BIAS.get(name))
    grads = jax.grad(lambda o: LOSSES[name](o, batch)[0])(outputs)
    assert not np.any(grads.image_emb[9:]) and not np.any(grads.text_emb[9:])
    garbage = dataclasses.replace(outputs, image_emb=outputs.image_emb.at[9:].set(5.0))
    assert LOSSES[name](garbage, batch)[0] == LOSSES[name](outputs, batch)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_batch_without_valid_rows_has_zero_loss_and_finite_gradients(name):
    outputs, batch = make_example(valid=np.zeros(12, bool), bias=BIAS.get(name))
    loss, grads = jax.value_and_grad(lambda o: LOSSES[name](o, batch)[0])(outputs)
    assert loss == 0.0
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_softmax_rejects_a_model_with_a_bias():
    outputs, batch = make_example(bias=-10.0)
    with pytest.raises(ValueError, match="sigmoid"):
        SoftmaxLoss()(outputs, batch)


def test_missing_groups_are_an_error():
    outputs, batch = make_example()
    with pytest.raises(ValueError, match="group"):
        SoftmaxLoss(positives="group")(outputs, batch.replace(group=None))


def test_total_is_the_weighted_sum_and_metrics_are_named_after_the_losses():
    outputs, batch = make_example(bias=None)
    objective = objectives.build_objective({"softmax": {"weight": 2.0}, "sigmoid": {"weight": 0.5}})
    loss, metrics = objective(outputs, batch)
    softmax, sigmoid = SoftmaxLoss()(outputs, batch)[0], SigmoidLoss()(outputs, batch)[0]
    np.testing.assert_allclose(loss, 2.0 * softmax + 0.5 * sigmoid, rtol=1e-6)
    assert {"softmax", "sigmoid"} <= metrics.keys()


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"sofmax": {}}, "known: softmax, sigmoid"),
        ({"softmax": {"wieght": 1.0}}, "wieght"),
        ({"softmax": {"weight": 0.0}}, "weight other than 0"),
    ],
)
def test_error_for_an_invalid_config_names_the_problem(cfg, message):
    with pytest.raises(ValueError, match=message):
        objectives.build_objective(cfg)
