from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax.evals.validation_loss import ValidationLoss, evaluation_loss
from imgtune_jax.objectives.sigmoid import SigmoidLoss
from imgtune_jax.objectives.softmax import SoftmaxLoss


def random_pairs(fakes, n=10, d=6, seed=0):
    rng = np.random.default_rng(seed)
    image = fakes.unit(rng.normal(size=(n, d))).astype(np.float32)
    return image, fakes.unit(image + 0.5 * rng.normal(size=(n, d))).astype(np.float32)


def softmax_losses(image, text, scale):
    """Return the loss of each pair, averaged over the two directions."""
    logits = scale * image.astype(np.float64) @ text.T.astype(np.float64)

    def cross_entropy(z):
        return np.log(np.exp(z).sum(1)) - np.diag(z)

    return (cross_entropy(logits) + cross_entropy(logits.T)) / 2


def test_loss_without_batch_size_is_the_objective_over_all_pairs(fakes):
    image, text = random_pairs(fakes)
    got = evaluation_loss(SoftmaxLoss(), image, text, np.ones(10, bool), logit_scale=7.0)
    expected = softmax_losses(image, text, 7.0).mean()
    np.testing.assert_allclose([got["loss"], got["softmax"]], expected, rtol=1e-5)


def test_batched_loss_weights_examples_equally_with_an_uneven_last_batch(fakes):
    image, text = random_pairs(fakes)
    got = evaluation_loss(
        SoftmaxLoss(), image, text, np.ones(10, bool), logit_scale=7.0, batch_size=4
    )
    losses = [softmax_losses(image[i : i + 4], text[i : i + 4], 7.0) for i in (0, 4, 8)]
    np.testing.assert_allclose(
        [got["loss"], got["softmax"]], np.concatenate(losses).mean(), rtol=1e-5
    )


def test_masked_rows_and_fully_masked_batches_are_ignored(fakes):
    image, text = random_pairs(fakes)
    mask = np.ones(10, bool)
    mask[4:8] = False
    got = evaluation_loss(SigmoidLoss(), image, text, mask, logit_scale=5.0, batch_size=4)
    losses = [evaluation_loss(SigmoidLoss(), image[r], text[r], mask[r], logit_scale=5.0)["loss"]
            for r in (slice(0, 4), slice(8, 10))]  # fmt: skip
    np.testing.assert_allclose(got["loss"], (4 * losses[0] + 2 * losses[1]) / 6, rtol=1e-6)


def test_evaluator_uses_scale_bias_group_and_first_caption(fakes):
    image, text = random_pairs(fakes, 6)
    names = [f"c{i}" for i in range(6)]
    source = [
        fakes.record(v, n, "second", group=i // 2)
        for i, (v, n) in enumerate(zip(image, names, strict=True))
    ]
    source[3] = fakes.record(image[3], group=1)  # no caption: masked
    texts = {**dict(zip(names, text, strict=True)), "": np.ones(6)}
    predictor = fakes.Predictor(texts, logit_scale=9.0, logit_bias=-4.0)
    got = ValidationLoss(source, SigmoidLoss(positives="group"))(predictor)
    rows = [0, 1, 2, 4, 5]
    group = np.array([0, 0, 1, 2, 2])
    logits = 9.0 * image[rows] @ text[rows].T - 4.0
    sign = np.where(group[:, None] == group, 1, -1)
    np.testing.assert_allclose(got["loss"], np.log1p(np.exp(-sign * logits)).sum() / 5, rtol=1e-5)
    assert (got["num_examples"], got["num_masked"]) == (5, 1)


def test_the_prefix_is_passed_to_the_predictor(fakes):
    image, text = random_pairs(fakes, 4)
    names = [f"c{i}" for i in range(4)]
    source = [fakes.record(v, n) for v, n in zip(image, names, strict=True)]
    predictor = fakes.Predictor({f"<de>{n}": x for n, x in zip(names, text, strict=True)})
    got = ValidationLoss(source, SoftmaxLoss(), prefix="<de>")(predictor)
    np.testing.assert_allclose(got["loss"], softmax_losses(image, text, 10.0).mean(), rtol=1e-5)


def test_no_valid_example_raises(fakes):
    with pytest.raises(ValueError, match="none of the 3 examples is valid"):
        evaluation_loss(
            lambda o, b: (jnp.float32(0), {}),
            np.eye(3),
            np.eye(3),
            np.zeros(3, bool),
            logit_scale=1.0,
        )
