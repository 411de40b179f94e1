"""The losses as functions of arrays equal dense formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imgtune_jax.objectives import sigmoid_loss, softmax_loss, token_cross_entropy
from imgtune_jax.types import TokenScores

N, D = 12, 5  # number of examples, width of the embeddings
GROUPS = jnp.arange(N) // 3
MASK = jnp.arange(N) % 5 != 2


def embeddings(seed=0):
    emb = np.random.default_rng(seed).normal(size=(2, N, D)).astype(np.float32)
    return jnp.asarray(emb / np.linalg.norm(emb, axis=-1, keepdims=True))


def dense_softmax_loss(image, text, scale, groups, mask, label_smoothing):
    logits = scale * jnp.matmul(image, text.T, precision="highest")
    logits = jnp.where(mask[None], logits, -jnp.inf)
    transposed = jnp.where(
        mask[None], scale * jnp.matmul(text, image.T, precision="highest"), -jnp.inf
    )
    positive = (groups[:, None] == groups[None]) & mask[None]
    uniform = mask / mask.sum()
    target = (1 - label_smoothing) * positive / positive.sum(1, keepdims=True)
    target = jnp.where(mask[:, None], target + label_smoothing * uniform[None], 0)
    losses = [
        -jnp.where(target > 0, target * jax.nn.log_softmax(x), 0).sum()
        for x in (logits, transposed)
    ]
    return (losses[0] + losses[1]) / 2 / mask.sum()


def dense_sigmoid_loss(image, text, scale, bias, groups, mask):
    logits = scale * jnp.matmul(image, text.T, precision="highest") + bias
    losses = optax.sigmoid_binary_cross_entropy(logits, groups[:, None] == groups[None])
    return jnp.where(mask[:, None] & mask[None], losses, 0).sum() / mask.sum()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["pair", "group"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all_valid", "masked"])
def test_softmax_loss_equals_the_dense_formula(label_smoothing, groups, mask):
    options = dict(positive_id=groups, mask=mask, label_smoothing=label_smoothing)
    dense_groups = jnp.arange(N) if groups is None else groups
    dense_mask = jnp.ones(N, bool) if mask is None else mask

    def loss(image, text, scale):
        return softmax_loss(image, text, scale=scale, **options)

    def dense(image, text, scale):
        return dense_softmax_loss(image, text, scale, dense_groups, dense_mask, label_smoothing)

    args = (*embeddings(), jnp.float32(7.0))
    actual = jax.value_and_grad(loss, argnums=(0, 1, 2))(*args)
    expected = jax.value_and_grad(dense, argnums=(0, 1, 2))(*args)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected
    )


def test_softmax_loss_equals_optax_on_one_hot_labels():
    image, text = embeddings()
    logits = 7.0 * jnp.matmul(image, text.T, precision="highest")
    labels = jnp.arange(N)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    expected = jnp.stack([cross_entropy(x, labels) for x in (logits, logits.T)]).mean()
    np.testing.assert_allclose(softmax_loss(image, text, scale=7.0), expected, rtol=1e-6)


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["pair", "group"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all_valid", "masked"])
def test_sigmoid_loss_equals_optax(groups, mask):
    dense_groups = jnp.arange(N) if groups is None else groups
    dense_mask = jnp.ones(N, bool) if mask is None else mask

    def loss(image, text, scale, bias):
        return sigmoid_loss(image, text, scale=scale, bias=bias, positive_id=groups, mask=mask)

    def dense(image, text, scale, bias):
        return dense_sigmoid_loss(image, text, scale, bias, dense_groups, dense_mask)

    args = (*embeddings(), jnp.float32(7.0), jnp.float32(-3.0))
    actual = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*args)
    expected = jax.value_and_grad(dense, argnums=(0, 1, 2, 3))(*args)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected
    )


def test_sigmoid_loss_has_no_bias_by_default():
    image, text = embeddings()
    default = sigmoid_loss(image, text, scale=7.0)
    assert default == sigmoid_loss(image, text, scale=7.0, bias=0.0)


@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.2, 1e-2)])
def test_token_cross_entropy_equals_optax(label_smoothing, z_loss):
    rng = np.random.default_rng(0)
    b, t, v = 3, 4, 11
    logits = jnp.asarray(rng.normal(size=(b, t, v)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, v, (b, t)))
    mask = jnp.asarray(rng.random((b, t)) < 0.6)
    log_p, logsumexp = jax.nn.log_softmax(logits), jax.nn.logsumexp(logits, axis=-1)
    log_prob = jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    scores = TokenScores(log_prob, logsumexp, log_p.mean(-1), jnp.zeros((b, t)))
    labels = optax.smooth_labels(jax.nn.one_hot(tokens, v), label_smoothing)
    losses = optax.softmax_cross_entropy(logits, labels) + z_loss * logsumexp**2
    actual = token_cross_entropy(scores, mask, label_smoothing=label_smoothing, z_loss=z_loss)
    np.testing.assert_allclose(actual, losses[mask].mean(), rtol=1e-6)


def test_losses_without_valid_rows_are_zero():
    image, text = embeddings()
    mask = jnp.zeros(N, bool)
    assert softmax_loss(image, text, scale=7.0, mask=mask) == 0
    assert sigmoid_loss(image, text, scale=7.0, mask=mask) == 0


def test_embeddings_of_different_shapes_are_an_error():
    image, text = embeddings()
    with pytest.raises(AssertionError, match="shape"):
        softmax_loss(image, text[:-1], scale=7.0)
