"""The two forms of a depthwise convolution return equal values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax import xla_cpu
from imgtune_jax.models import conv


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (2, 5), (1, 3)])
@pytest.mark.parametrize("k", [3, 5])
def test_shifted_form_and_its_gradients_equal_the_grouped_form(k, size, stride):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, *size, 6)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(k, k, 1, 6)), jnp.float32)

    def value_and_gradients(convolve):
        y, vjp = jax.vjp(lambda x, w: convolve(x, w, stride), x, kernel)
        return y, *vjp(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    expected = value_and_gradients(conv.depthwise_conv)
    for got, want in zip(
        value_and_gradients(xla_cpu.shifted_depthwise_conv), expected, strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
