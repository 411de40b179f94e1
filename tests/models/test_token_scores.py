"""Chunked scores equal unchunked ones; no array holds the logits of a full text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax.models.token_scores import token_scores

B, T, D, V = 3, 10, 8, 101


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    hidden, kernel = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    target = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    return jnp.asarray(hidden, jnp.float32), jnp.asarray(kernel, jnp.float32), target


def unchunked(hidden, kernel, bias, target):
    logits = hidden @ kernel + bias[None, None]
    log_probs = jax.nn.log_softmax(logits)
    log_prob = jnp.take_along_axis(log_probs, target[..., None], axis=-1)[..., 0]
    correct = logits.argmax(-1) == target
    return log_prob, jax.nn.logsumexp(logits, -1), log_probs.mean(-1), correct.astype(jnp.float32)


@pytest.mark.parametrize("chunk", [1, 3, 5, 10, 64])
def test_scores_and_gradients_equal_those_of_unchunked_logits(chunk):
    args, weights = inputs(), jnp.asarray(np.random.default_rng(1).normal(size=(3, B, T)))
    bias = jnp.asarray(np.random.default_rng(2).normal(size=V), jnp.float32)

    def loss(f):
        def value(hidden, kernel, bias):
            out = f(hidden, kernel, bias, args[2])
            return sum((w * x).sum() for w, x in zip(weights, out[:3], strict=True)), out

        return jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))(*args[:2], bias)

    (_, want), want_grads = loss(unchunked)
    (_, got), got_grads = loss(
        lambda x, kernel, bias, ids: token_scores(x, kernel, ids, bias=bias, chunk=chunk)
    )
    for x, y in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_no_array_of_the_compiled_program_holds_all_logits():
    hidden, kernel, target = inputs()

    def loss(hidden, kernel):
        return token_scores(hidden, kernel, target, chunk=2).log_prob.sum()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, kernel).compile().as_text()
    all_shapes = {f"[{B},{n},{V}]" for n in (T, T // 2)}
    all_shapes |= {f"[{B * T},{V}]", f"[{T // 2},{B},2,{V}]"}
    assert f"[{B},2,{V}]" in text or f"[{2 * B},{V}]" in text  # the logits of a chunk are present
    assert not any(shape in text for shape in all_shapes)


@pytest.mark.parametrize("chunk", [3, 64])
def test_the_log_prob_of_a_target_outside_the_vocabulary_is_nan(chunk):
    hidden, kernel, target = inputs()
    invalid = target.at[0, 1].set(-1).at[2, 7].set(V)
    got, want = (token_scores(hidden, kernel, t, chunk=chunk) for t in (invalid, target))
    changed = np.asarray(invalid != target)
    assert np.isnan(got.log_prob[changed]).all()
    np.testing.assert_array_equal(got.log_prob[~changed], want.log_prob[~changed])
