"""The captioning loss equals a float64 loop over tokens; masked tokens do not affect it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax import objectives
from imgtune_jax.objectives.caption_loss import CaptionLoss
from imgtune_jax.types import Batch, Outputs, TokenScores, metric_value

B, L, V = 4, 6, 11  # batch size, text length, vocabulary size


def make_example(seed=0):
    """Return (logits [b t v], batch, outputs); lengths and prompt lengths vary by row."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(B, L - 1, V)).astype(np.float32)
    text = rng.integers(1, V, (B, L))
    lengths, prompt_lengths = np.array([6, 3, 5, 1]), np.array([1, 1, 3, 1])
    mask = np.arange(L) < lengths[:, None]
    target_mask = mask & (np.arange(L) >= prompt_lengths[:, None])
    batch = Batch(
        example_mask=jnp.asarray([True, True, True, False]),
        text=jnp.asarray(text),
        text_mask=jnp.asarray(mask),
        target_mask=jnp.asarray(target_mask),
    )
    log_p = jax.nn.log_softmax(jnp.asarray(logits))
    log_prob = jnp.take_along_axis(log_p, jnp.asarray(text)[:, 1:, None], axis=2)[..., 0]
    correct = (logits.argmax(-1) == text[:, 1:]).astype(np.float32)
    logsumexp = jax.nn.logsumexp(jnp.asarray(logits), -1)
    scores = TokenScores(log_prob, logsumexp, log_p.mean(-1), jnp.asarray(correct))
    return logits, batch, Outputs(token_scores=scores)


def reference_loss(logits, batch, smoothing, z_loss):
    """Return (loss, cross-entropy, number of tokens), computed token by token in float64."""
    logits = logits.astype(np.float64)
    losses, cross_entropies = [], []
    for i in range(B):
        for t in range(L - 1):
            if not batch.example_mask[i] or not batch.target_mask[i, t + 1]:
                continue
            logsumexp = np.log(np.exp(logits[i, t]).sum())
            log_p = logits[i, t] - logsumexp
            cross_entropies.append(-log_p[int(batch.text[i, t + 1])])
            target = np.full(V, smoothing / V)
            target[int(batch.text[i, t + 1])] += 1 - smoothing
            losses.append(-(target * log_p).sum() + z_loss * logsumexp**2)
    return np.mean(losses), np.mean(cross_entropies), len(losses)


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.2, 1e-2)])
def test_loss_is_the_mean_over_target_tokens(smoothing, z_loss):
    logits, batch, outputs = make_example()
    loss, metrics = CaptionLoss(smoothing, z_loss)(outputs, batch)
    expected, cross_entropy, count = reference_loss(logits, batch, smoothing, z_loss)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(metric_value(metrics["captioning"]), cross_entropy, rtol=1e-6)
    np.testing.assert_allclose(
        metric_value(metrics["perplexity"]), np.exp(cross_entropy), rtol=1e-6
    )
    assert metrics["captioning"][1] == count


def test_masked_positions_have_no_gradient_and_pad_ids_do_not_matter():
    _, batch, outputs = make_example()

    def loss(log_prob, batch):
        scores = outputs.token_scores._replace(log_prob=log_prob)
        return CaptionLoss()(outputs.replace(token_scores=scores), batch)[0]

    grad = np.asarray(jax.grad(loss)(outputs.token_scores.log_prob, batch))
    is_target = np.asarray(batch.target_mask[:, 1:] & batch.example_mask[:, None])
    assert (grad[is_target] != 0).all() and (grad[~is_target] == 0).all()
    other_padding = batch.replace(text=jnp.where(batch.text_mask, batch.text, 5))
    assert loss(outputs.token_scores.log_prob, other_padding) == loss(
        outputs.token_scores.log_prob, batch
    )


def test_batch_without_targets_has_zero_loss():
    _, batch, outputs = make_example()
    empty = batch.replace(example_mask=jnp.zeros(B, bool))
    loss, metrics = CaptionLoss(0.1, 0.1)(outputs, empty)
    assert loss == 0 and metric_value(metrics["perplexity"]) == 1


def test_captioning_has_a_weight_and_errors_name_the_missing_input():
    _, batch, outputs = make_example()
    weighted = objectives.build_objective({"captioning": dict(weight=2.0, label_smoothing=0.1)})
    total, metrics = weighted(outputs, batch)
    np.testing.assert_allclose(total, 2 * CaptionLoss(0.1)(outputs, batch)[0])
    assert set(metrics) == {"captioning", "perplexity", "token_accuracy"}
    with pytest.raises(ValueError, match="needs a model with a decoder"):
        weighted(Outputs(), batch)
    with pytest.raises(ValueError, match="expected 0 <= label_smoothing < 1"):
        CaptionLoss(label_smoothing=1.0)
