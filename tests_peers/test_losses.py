"""Contrastive losses and all their gradients equal those of open_clip 3.3.0."""

import jax
import jax.numpy as jnp
import numpy as np
import open_clip
import pytest
import torch

from imgtune_jax.objectives import pairs
from imgtune_jax.objectives.sigmoid import SigmoidLoss
from imgtune_jax.objectives.softmax import SoftmaxLoss
from imgtune_jax.types import Batch, Outputs

CASES = {
    "softmax": (SoftmaxLoss(), open_clip.ClipLoss(), None),
    "sigmoid": (SigmoidLoss(), open_clip.loss.SigLipLoss(), -10.0),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
@pytest.mark.parametrize("block_size", [2**23, 1000])
def test_loss_and_gradients_equal_open_clip(name, scale, block_size, monkeypatch):
    monkeypatch.setattr(pairs, "BLOCK_SIZE", block_size)
    objective, open_clip_loss, bias = CASES[name]
    rng = np.random.default_rng(0)
    image, text = rng.standard_normal((2, 97, 16), np.float32)
    text += image
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    scalars = [scale] if bias is None else [scale, bias]
    tensors = [torch.tensor(x, requires_grad=True) for x in (image, text, *scalars)]
    expected = open_clip_loss(*tensors)
    expected.backward()

    def our_loss(image, text, scale, bias=None):
        return objective(Outputs(image, text, scale, bias), Batch(jnp.ones(97, bool)))[0]

    arguments = [image, text, *map(jnp.float32, scalars)]
    actual, grads = jax.value_and_grad(our_loss, range(len(arguments)))(*arguments)
    # Logits are up to 100, in float32, and are summed in another order.
    np.testing.assert_allclose(actual, expected.item(), rtol=2e-6)
    for grad, tensor in zip(grads, tensors, strict=True):
        largest = tensor.grad.abs().max().item()
        np.testing.assert_allclose(grad, tensor.grad, rtol=1e-5, atol=1e-5 * largest)
