"""Depthwise convolution by shifts against XLA's grouped convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax import xla_cpu
from imgtune_jax.models import conv


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (2, 5), (1, 3)])
@pytest.mark.parametrize("k", [3, 5])
def test_shifted_equals_grouped_with_its_gradients(k, size, stride):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, *size, 6)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(k, k, 1, 6)), jnp.float32)

    def values(run):
        y, pull_back = jax.vjp(lambda x, w: run(x, w, stride), x, kernel)
        return y, *pull_back(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    found, wanted = values(xla_cpu.shifted_depthwise_conv), values(conv.depthwise_conv)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
