"""Dense, attention, layer norm and activations equal their formulas in NumPy or JAX."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from imgtune_jax import xla_cpu
from imgtune_jax.models import attention, layers


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_dense_in_bf16_has_bf16_products_forward_and_backward():
    """Operands are bf16 and results float32. Autodiff would multiply a float32 cotangent."""
    x, w = jnp.asarray(normal(4, 6, 8)), jnp.asarray(normal(8, 16))
    gradient = jax.grad(lambda x, w: layers.dense(x, w, dtype=jnp.bfloat16).sum(), (0, 1))
    text = jax.jit(gradient).lower(x, w).as_text()
    forward = jax.jit(lambda x, w: layers.dense(x, w, dtype=jnp.bfloat16)).lower(x, w).as_text()
    dots = [line for line in (text + forward).splitlines() if "stablehlo.dot_general" in line]
    assert len(dots) == 3
    for line in dots:
        operands, result = line.rsplit(":", 1)[1].split("->")
        assert operands.count("bf16") == 2 and "f32" in result, line


def test_dense_in_bf16_is_the_float32_product_of_rounded_operands():
    x, w, b = normal(3, 5, 8), normal(8, 4), normal(4)
    rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in (x, w)]
    y = layers.dense(jnp.asarray(x), jnp.asarray(w), jnp.asarray(b), dtype=jnp.bfloat16)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, rounded[0] @ rounded[1] + b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel_type", [jnp.float32, jnp.bfloat16])
def test_dense_gradients_have_the_types_of_the_operands(kernel_type):
    x, w = jnp.asarray(normal(3, 5, 8)), jnp.asarray(normal(8, 4), kernel_type)

    def scalar(x, w, dtype):
        return jnp.square(layers.dense(x, w, dtype=dtype)).sum()

    low = jax.grad(scalar, (0, 1))(x, w, jnp.bfloat16)
    exact = jax.grad(scalar, (0, 1))(x, w.astype(jnp.float32), jnp.float32)
    assert low[1].dtype == kernel_type and low[0].dtype == jnp.float32
    for got, want in zip(low, exact, strict=True):
        # bf16 operands have 8 significant bits.
        np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=0.05, atol=0.3)


def numpy_attention(q, k, v, visible):
    scores = np.einsum("bhqd,bhkd->bhqk", *(a.astype(np.float64) for a in (q, k)))
    scores = np.where(visible, scores / np.sqrt(q.shape[-1]), -np.inf)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    return np.einsum("bhqk,bhkd->bhqd", weight, v)


def attention_masks():
    keys = np.arange(5) < np.array([5, 3])[:, None]
    pairs = np.random.default_rng(9).random((2, 5, 5)) < 0.6
    pairs[0, 1] = False  # a query without a visible key
    return {"none": None, "keys": jnp.asarray(keys), "pairs": jnp.asarray(pairs)}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_numpy(causal, masked):
    q, k, v = (normal(2, 3, 5, 4, seed=i) for i in range(3))
    mask = attention_masks()["keys"] if masked else None
    visible = np.ones((2, 1, 5, 5), bool)
    visible &= np.asarray(mask)[:, None, None, :] if mask is not None else True
    visible &= np.tri(5, dtype=bool) if causal else True
    y = layers.attention(*map(jnp.asarray, (q, k, v)), mask=mask, causal=causal)
    np.testing.assert_allclose(y, numpy_attention(q, k, v, visible), rtol=1e-5, atol=1e-6)


def jax_attention(q, k, v, *, mask, causal):
    """The attention of JAX with gradients by autodiff. Its position axis precedes its head axis."""
    if mask is not None:
        mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
    positions_first = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.nn.dot_product_attention(*positions_first, mask=mask, is_causal=causal).swapaxes(
        1, 2
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "keys", "pairs"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_and_its_gradient_equal_those_of_jax(mask, causal, dtype):
    qkv = tuple(jnp.asarray(normal(2, 3, 5, 4, seed=i), dtype) for i in range(3))
    weights = jnp.asarray(normal(2, 3, 5, 4, seed=3))

    def value_and_gradients(attend, dtype):
        def weighted_sum(*qkv):
            y = attend(*qkv, mask=attention_masks()[mask], causal=causal)
            return (weights * y.astype(jnp.float32)).sum(), y

        (_, y), gradients = jax.value_and_grad(weighted_sum, (0, 1, 2), has_aux=True)(
            *(x.astype(dtype) for x in qkv)
        )
        return y, *gradients

    got = value_and_gradients(layers.attention, dtype)
    want = value_and_gradients(jax_attention, jnp.float32)
    assert all(x.dtype == dtype for x in got)
    # bf16 has 8 significant bits. Values are at most 4, and sums have five terms.
    close = dict(rtol=1e-5, atol=2e-6) if dtype == jnp.float32 else dict(rtol=0.05, atol=0.05)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, **close)


def test_a_query_without_visible_keys_averages_all_values_with_zero_gradients_of_q_and_k():
    q, k, v = (jnp.asarray(normal(1, 2, 3, 4, seed=i)) for i in range(3))
    mask = jnp.zeros((1, 3), bool)
    y = layers.attention(q, k, v, mask=mask)
    mean = jnp.broadcast_to(v.mean(2, keepdims=True), v.shape)
    np.testing.assert_allclose(y, mean, rtol=1e-6, atol=1e-6)
    gradients = jax.grad(lambda q, k: layers.attention(q, k, v, mask=mask).sum(), (0, 1))(q, k)
    assert not any(np.any(g) for g in gradients)


def test_products_transpose_no_operand():
    """A compiler would copy a transposed operand, and fuse its computation into the copy."""

    def lowered(f, *shapes):
        args = [jnp.ones(shape) for shape in shapes]
        return jax.jit(jax.grad(f, tuple(range(len(args))))).lower(*args).as_text()

    dense = lowered(lambda x, w: layers.dense(x, w).sum(), (2, 3, 4), (4, 5))
    attention = lowered(lambda *qkv: layers.attention(*qkv).sum(), *[(2, 3, 5, 4)] * 3)
    for text, num_products in ((dense, 2), (attention, 6)):
        contracted = re.findall(r"contracting_dims = \[([^]]*)\] x \[([^]]*)\]", text)
        assert len(contracted) == num_products
        assert all(len(a) == len(b) == 1 for a, b in contracted)
        assert "transpose" not in text


def lowered_gradient(f, dtype, platform, *shapes):
    args = [jnp.ones(shape, dtype) for shape in shapes]
    gradient = jax.jit(jax.grad(lambda *xs: f(*xs).astype(jnp.float32).sum(), range(len(args))))
    return gradient.trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_only_low_precision_products_on_a_cpu_have_another_form(dtype, platform):
    """XLA:CPU computes in float32 if two axes are batched or the first operand's rows are summed.

    In the other form, there is at most one batch axis, and the sum is over the last axis.
    """
    dense = lowered_gradient(
        lambda x, w: layers.dense(x, w, dtype=dtype), dtype, platform, (8, 4), (4, 6)
    )
    attention = lowered_gradient(layers.attention, dtype, platform, *[(2, 3, 6, 4)] * 3)
    other_form = platform == "cpu" and dtype == jnp.bfloat16
    for text, num_batch_axes in ((dense, 0), (attention, 1 if other_form else 2)):
        assert [int(n) for n in re.findall(r"batching_dims = \[[^]]*(\d)\] x", text)] == (
            [num_batch_axes - 1] * 6 if num_batch_axes else []
        )
        contracted = re.findall(r"contracting_dims = \[(\d)\]", text)
        assert (str(num_batch_axes) not in contracted) == ("transpose" in text) == other_form


@pytest.mark.parametrize("columns", [1, 6, 7, 48])
def test_swap_last_axes_is_the_transpose(columns):
    x = jnp.asarray(normal(2, 5, columns))
    np.testing.assert_array_equal(xla_cpu.swap_last_axes(x), np.swapaxes(x, 1, 2))


def test_softmax_stays_float32_for_bf16_operands():
    """With 1024 equal keys, the weights of a bf16 softmax would not sum to one."""
    q = jnp.zeros((1, 1, 1, 4), jnp.bfloat16)
    lowered = jax.jit(lambda q, k: layers.attention(q, k, k)).lower(
        q, jnp.zeros((1, 1, 1024, 4), q.dtype)
    )
    exponentials = [line for line in lowered.as_text().splitlines() if "exponential" in line]
    assert exponentials and all("f32" in line for line in exponentials)


def test_layer_norm_equals_numpy_far_from_zero():
    x = normal(4, 16) + 1000  # E[x²] - E[x]² would lose the variance here
    norm = layers.LayerNorm(1e-5)
    params = {"scale": jnp.asarray(normal(16)), "bias": jnp.asarray(normal(16, seed=1))}
    exact = x.astype(np.float64)
    want = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
    want = want * np.asarray(params["scale"]) + np.asarray(params["bias"])
    got = norm.apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)  # 3 of 7 digits remain


def test_layer_norm_gradient_equals_the_gradient_of_its_formula():
    x, g = normal(3, 5, 16), jnp.asarray(normal(3, 5, 16, seed=1))
    scale, bias = jnp.asarray(normal(16, seed=2)), jnp.asarray(normal(16, seed=3))

    def formula(x, scale, bias):
        centered = x - x.mean(-1, keepdims=True)
        y = centered / jnp.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
        return (g * (y * layers.expand_like(scale, y) + layers.expand_like(bias, y))).sum()

    args = (jnp.asarray(2 * x + 3), scale, bias)
    want = jax.grad(formula, (0, 1, 2))(*args)
    got = jax.grad(lambda *a: (g * layers.layer_norm(*a, 1e-5)).sum(), (0, 1, 2))(*args)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("gelu", lambda x: x * (1 + erf(x / np.sqrt(2))) / 2),
        ("gelu_tanh", lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
        ("quick_gelu", lambda x: x / (1 + np.exp(-1.702 * x))),
        ("relu", lambda x: np.maximum(x, 0)),
        ("relu6", lambda x: np.clip(x, 0, 6)),
        ("silu", lambda x: x / (1 + np.exp(-x))),
    ],
)
def test_activations_equal_their_formulas(name, want):
    x = np.linspace(-8, 8, 201)
    got = layers.activation(name)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, want(x), rtol=1e-5, atol=1e-6)


def test_an_unknown_activation_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'swish' is not one of gelu, gelu_tanh"):
        layers.activation("swish")


def test_num_heads_that_does_not_divide_the_width_is_an_error():
    with pytest.raises(ValueError, match="width 10 is not divisible by num_heads=4"):
        attention.Attention(4).init(jax.random.key(0), jnp.zeros((1, 2, 10)))


def test_an_id_outside_the_vocabulary_is_embedded_as_nan():
    table = layers.Embed(3, 2)
    y = table.apply({"params": {"embedding": jnp.ones((3, 2))}}, jnp.array([0, 2, 3, -1, -9]))
    assert np.isfinite(y[:2]).all() and np.isnan(y[2:]).all()
