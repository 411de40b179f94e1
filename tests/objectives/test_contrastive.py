"""Contrastive losses against loops over pairs in float64, and their laws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax import config, objectives
from imgtune_jax.objectives.sigmoid import Sigmoid
from imgtune_jax.objectives.softmax import Softmax
from imgtune_jax.partition import Partitioner, make_mesh
from imgtune_jax.types import Batch, Outputs

LOSSES = {
    "softmax": Softmax(),
    "softmax_group": Softmax(positives="group"),
    "softmax_smooth": Softmax(label_smoothing=0.1),
    "sigmoid": Sigmoid(),
    "sigmoid_group": Sigmoid(positives="group"),
}


def example(n=12, d=5, *, valid=None, bias=None, seed=0):
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
    """Pair by pair, in float64."""
    keep = np.flatnonzero(batch.example_mask)
    image = np.asarray(outputs.image_emb, np.float64)[keep]
    text = np.asarray(outputs.text_emb, np.float64)[keep]
    group = np.asarray(batch.group)[keep]
    n = len(keep)
    logits = float(outputs.logit_scale) * image @ text.T
    right = group[:, None] == group[None] if name.endswith("group") else np.eye(n, dtype=bool)
    total = 0.0
    if name.startswith("sigmoid"):
        logits = logits + float(outputs.logit_bias)
        for i in range(n):
            for j in range(n):
                z = 1.0 if right[i, j] else -1.0
                total += np.log1p(np.exp(-z * logits[i, j]))
        return total / n
    smoothing = 0.1 if name.endswith("smooth") else 0.0
    for i in range(n):
        for row, positive in ((logits[i], right[i]), (logits[:, i], right[:, i])):
            log_p = row - np.log(np.sum(np.exp(row)))
            target = (1 - smoothing) * positive / positive.sum() + smoothing / n
            total -= 0.5 * np.sum(target * log_p)
    return total / n


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("masked", [False, True])
def test_loss_equals_brute_force(name, masked):
    valid = np.arange(12) % 5 != 2 if masked else None
    outputs, batch = example(valid=valid, bias=-3.0 if "sigmoid" in name else None)
    loss, metrics = LOSSES[name](outputs, batch)
    np.testing.assert_allclose(loss, brute_force(name, outputs, batch), rtol=2e-6)
    total, count = metrics["sigmoid" if "sigmoid" in name else "softmax"]
    np.testing.assert_allclose(total / count, loss, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_masked_rows_change_neither_loss_nor_gradient(name):
    valid = np.arange(12) < 9
    outputs, batch = example(valid=valid, bias=-3.0 if "sigmoid" in name else None)
    grads = jax.grad(lambda o: LOSSES[name](o, batch)[0])(outputs)
    assert not np.any(grads.image_emb[9:]) and not np.any(grads.text_emb[9:])
    garbage = dataclasses.replace(outputs, image_emb=outputs.image_emb.at[9:].set(5.0))
    assert LOSSES[name](garbage, batch)[0] == LOSSES[name](outputs, batch)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_valid_rows_has_zero_loss_and_finite_gradients(name):
    outputs, batch = example(valid=np.zeros(12, bool), bias=-3.0 if "sigmoid" in name else None)
    loss, grads = jax.value_and_grad(lambda o: LOSSES[name](o, batch)[0])(outputs)
    assert loss == 0.0
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_do_not_depend_on_sharding(name):
    outputs, batch = example(n=16, bias=-3.0 if "sigmoid" in name else None)
    f = jax.value_and_grad(lambda o, b: LOSSES[name](o, b)[0])
    whole = jax.jit(f)(outputs, batch)
    part = Partitioner(make_mesh(config.Mesh(data=-1, fsdp=1, tensor=1)))
    assert part.batch_devices == 8
    place = lambda x: jax.device_put(x, part.by_batch if x.ndim else part.replicated)
    cut = jax.jit(f)(*jax.tree.map(place, (outputs, batch)))
    # atol: gradients near zero are sums of cancelling terms of size 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), whole, cut)


def test_softmax_refuses_a_model_with_a_bias():
    outputs, batch = example(bias=-10.0)
    with pytest.raises(ValueError, match="sigmoid"):
        Softmax()(outputs, batch)


def test_groups_that_the_data_lacks_are_named():
    outputs, batch = example()
    with pytest.raises(ValueError, match="group"):
        Softmax(positives="group")(outputs, batch.replace(group=None))


def test_total_is_the_weighted_sum_and_terms_keep_their_names():
    outputs, batch = example(bias=None)
    both = objectives.build({"softmax": {"weight": 2.0}, "sigmoid": {"weight": 0.5}})
    loss, metrics = both(outputs, batch)
    softmax, sigmoid = Softmax()(outputs, batch)[0], Sigmoid()(outputs, batch)[0]
    np.testing.assert_allclose(loss, 2.0 * softmax + 0.5 * sigmoid, rtol=1e-6)
    assert {"softmax", "sigmoid"} <= metrics.keys()


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        ({"sofmax": {}}, "known: softmax, sigmoid"),
        ({"softmax": {"wieght": 1.0}}, "wieght"),
        ({"softmax": {"weight": 0.0}}, "no objective"),
    ],
)
def test_a_wrong_config_is_named(cfg, says):
    with pytest.raises(ValueError, match=says):
        objectives.build(cfg)
