"""The captioning loss against a float64 loop over tokens; what must not matter does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax import objectives
from imgtune_jax.objectives.caption_loss import CaptionLoss
from imgtune_jax.types import Batch, Outputs, TokenScores, metric_value

B, L, V = 4, 6, 11


def case(seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(B, L - 1, V)).astype(np.float32)
    text = rng.integers(1, V, (B, L))
    lengths, prompts = np.array([6, 3, 5, 1]), np.array([1, 1, 3, 1])
    mask = np.arange(L) < lengths[:, None]
    target = mask & (np.arange(L) >= prompts[:, None])
    batch = Batch(
        example_mask=jnp.asarray([True, True, True, False]),
        text=jnp.asarray(text),
        text_mask=jnp.asarray(mask),
        target_mask=jnp.asarray(target),
    )
    log_p = jax.nn.log_softmax(jnp.asarray(logits))
    taken = jnp.take_along_axis(log_p, jnp.asarray(text)[:, 1:, None], axis=2)[..., 0]
    correct = (logits.argmax(-1) == text[:, 1:]).astype(np.float32)
    total = jax.nn.logsumexp(jnp.asarray(logits), -1)
    scores = TokenScores(taken, total, log_p.mean(-1), jnp.asarray(correct))
    return logits, batch, Outputs(token_scores=scores)


def by_hand(logits, batch, smoothing, z_loss):
    z = logits.astype(np.float64)
    losses, nats = [], []
    for i in range(B):
        for t in range(L - 1):
            if not batch.example_mask[i] or not batch.target_mask[i, t + 1]:
                continue
            total = np.log(np.exp(z[i, t]).sum())
            log_p = z[i, t] - total
            nats.append(-log_p[int(batch.text[i, t + 1])])
            target = np.full(V, smoothing / V)
            target[int(batch.text[i, t + 1])] += 1 - smoothing
            losses.append(-(target * log_p).sum() + z_loss * total**2)
    return np.mean(losses), np.mean(nats), len(nats)


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.2, 1e-2)])
def test_loss_is_the_mean_over_tokens_that_carry_loss(smoothing, z_loss):
    logits, batch, outputs = case()
    loss, metrics = CaptionLoss(smoothing, z_loss)(outputs, batch)
    want, nats, count = by_hand(logits, batch, smoothing, z_loss)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(metric_value(metrics["captioning"]), nats, rtol=1e-6)
    np.testing.assert_allclose(metric_value(metrics["perplexity"]), np.exp(nats), rtol=1e-6)
    assert metrics["captioning"][1] == count


def test_masked_positions_have_no_gradient_and_a_wrong_pad_id_does_not_matter():
    _, batch, outputs = case()

    def loss(log_prob, batch):
        scores = outputs.token_scores._replace(log_prob=log_prob)
        return CaptionLoss()(outputs.replace(token_scores=scores), batch)[0]

    g = jax.grad(loss)(outputs.token_scores.log_prob, batch)
    carries = np.asarray(batch.target_mask[:, 1:] & batch.example_mask[:, None])
    assert (np.asarray(g)[carries] != 0).all() and (np.asarray(g)[~carries] == 0).all()
    other = batch.replace(text=jnp.where(batch.text_mask, batch.text, 5))
    assert loss(outputs.token_scores.log_prob, other) == loss(outputs.token_scores.log_prob, batch)


def test_a_batch_without_targets_has_loss_zero_and_finite_gradients():
    _, batch, outputs = case()
    empty = batch.replace(example_mask=jnp.zeros(B, bool))
    loss, metrics = CaptionLoss(0.1, 0.1)(outputs, empty)
    assert loss == 0 and metric_value(metrics["perplexity"]) == 1


def test_it_is_a_term_like_the_others_and_says_what_it_lacks():
    _, batch, outputs = case()
    weighted = objectives.build_objective({"captioning": dict(weight=2.0, label_smoothing=0.1)})
    total, metrics = weighted(outputs, batch)
    np.testing.assert_allclose(total, 2 * CaptionLoss(0.1)(outputs, batch)[0])
    assert set(metrics) == {"captioning", "perplexity", "token_accuracy"}
    with pytest.raises(ValueError, match="needs a model with a decoder"):
        weighted(Outputs(), batch)
    with pytest.raises(ValueError, match="wanted 0 <= label_smoothing < 1"):
        CaptionLoss(label_smoothing=1.0)
