"""Properties of each tower: pooling, masks, positions, norms. EOT is the end-of-text token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax import models, param_tree
from imgtune_jax.models import conv, pooling, positions

CLOSE = dict(rtol=1e-5, atol=1e-6)
TEXT = dict(
    name="text_transformer",
    width=8,
    depth=2,
    mlp_dim=16,
    num_heads=2,
    vocab_size=20,
    max_length=6,
)
VIT = dict(name="vit", width=8, depth=1, mlp_dim=16, num_heads=2, patch_size=4, image_size=8)


def random_params(tower, scale=0.3):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.normal(0, scale, a.shape), jnp.float32),
        models.abstract_tower_params(tower),
    )


@functools.cache
def text_tower(**fields):
    tower = models.build_tower({**TEXT, **fields})
    params = random_params(tower)
    return jax.jit(lambda text, mask: tower.apply({"params": params}, text, mask, train=False))


def image_tower(**fields):
    tower = models.build_tower({**VIT, **fields})
    params = random_params(tower)
    return tower, params, jax.jit(lambda p, x: tower.apply({"params": p}, x, train=False))


def texts(*rows):
    text = jnp.asarray(rows, jnp.int32)
    return text, text > 0


def test_eot_is_pooled_at_the_last_valid_position():
    run = text_tower()
    out = run(*texts([3, 19, 7, 5, 0, 0]))
    np.testing.assert_array_equal(out.pooled, out.tokens[:, 3])


def test_causal_text_ignores_tokens_after_eot():
    for mask_padding in (True, False):
        run = text_tower(mask_padding=mask_padding)
        text, mask = texts([3, 9, 7, 0, 0, 0])
        noisy = jnp.where(mask, text, 11)
        np.testing.assert_allclose(run(noisy, mask).pooled, run(text, mask).pooled, **CLOSE)


def test_causal_text_tokens_ignore_future_tokens():
    tower = models.build_tower(TEXT)
    params = random_params(tower)
    text, mask = texts([3, 9, 7, 2, 4, 5])
    tokens = [tower.apply({"params": params}, t, mask, train=False).tokens
              for t in (text, text.at[0, 3].set(13))]  # fmt: skip
    np.testing.assert_allclose(tokens[0][:, :3], tokens[1][:, :3], **CLOSE)
    assert np.abs(tokens[0][:, 3:] - tokens[1][:, 3:]).min() > 0


@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_bidirectional_pooling_ignores_padding(pool):
    run = text_tower(pool=pool, causal=False)
    text, mask = texts([3, 9, 7, 0, 0, 0])
    noisy = jnp.where(mask, text, 11)
    np.testing.assert_allclose(run(noisy, mask).pooled, run(text, mask).pooled, **CLOSE)
    short = run(text[:, :4], mask[:, :4]).pooled
    np.testing.assert_allclose(short, run(text, mask).pooled, **CLOSE)


def test_last_pooling_depends_on_padding_and_requires_the_full_length():
    run = text_tower(pool="last", causal=False, mask_padding=False)
    text, mask = texts([3, 9, 7, 0, 0, 0])
    out = run(text, mask)
    np.testing.assert_array_equal(out.pooled, out.tokens[:, 5])
    other_padding = run(jnp.where(mask, text, 1), mask).pooled
    assert np.abs(other_padding - out.pooled).max() > 1e-3
    with pytest.raises(ValueError, match=r"exactly\s+max_length=6; got 4"):
        run(text[:, :4], mask[:, :4])


@pytest.mark.parametrize("name", ["text_transformer", "bert"])
def test_a_text_longer_than_max_length_is_an_error(name):
    tower = models.build_tower({**TEXT, "name": name})
    with pytest.raises(ValueError, match=r"text of 7 tokens, but .* has max_length=6"):
        jax.eval_shape(
            functools.partial(tower.init, train=False),
            jax.random.key(0),
            jnp.ones((1, 7), jnp.int32),
            jnp.ones((1, 7), bool),
        )


def test_masked_mean_without_valid_positions_is_zero():
    x, mask = jnp.ones((2, 3, 4)), jnp.array([[True, True, False], [False] * 3])
    np.testing.assert_array_equal(pooling.masked_mean(x, mask), [[1] * 4, [0] * 4])


def image(size=8, n=2):
    return jnp.asarray(np.random.default_rng(0).normal(size=(n, size, size, 3)), jnp.float32)


def numpy_norm(x, params, epsilon=1e-6):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return x * np.asarray(params["scale"]) + np.asarray(params["bias"])


@pytest.mark.parametrize("num_registers", [0, 2])
@pytest.mark.parametrize("pool", ["cls", "mean", "mean_all"])
def test_pooling_and_final_norm_equal_numpy(pool, num_registers):
    _, params, plain = image_tower(pool=pool, num_registers=num_registers, final_norm="none")
    tokens = np.asarray(plain(params, image()).tokens)
    assert tokens.shape[1] == 1 + num_registers + 4
    norm = {"scale": np.full(8, 0.7), "bias": np.linspace(-1, 1, 8)}
    params_with_norm = {**params, "final_norm": jax.tree.map(jnp.float32, norm)}
    pooled = {"cls": slice(0, 1), "mean": slice(1 + num_registers, None), "mean_all": slice(None)}
    for final_norm in ("before_pool", "after_pool"):
        _, _, run = image_tower(pool=pool, num_registers=num_registers, final_norm=final_norm)
        if final_norm == "before_pool":
            want = numpy_norm(tokens, norm)[:, pooled[pool]].mean(1)
        else:
            want = numpy_norm(tokens[:, pooled[pool]].mean(1), norm)
        np.testing.assert_allclose(
            run(params_with_norm, image()).pooled, want, rtol=1e-4, atol=1e-5
        )


def test_patch_embedding_equals_a_strided_convolution():
    _, params, run = image_tower(depth=0, positions="sincos", class_token=False, pool="mean",
                                 final_norm="none")  # fmt: skip
    kernel, bias = (params["patch_embed"][k] for k in ("kernel", "bias"))
    want = jax.lax.conv_general_dilated(
        image(), kernel, (4, 4), "VALID", dimension_numbers=conv.DIMENSION_NUMBERS
    ).reshape(2, 4, 8)
    want = np.asarray(want) + np.asarray(bias) + positions.sincos_2d(2, 8)
    np.testing.assert_allclose(run(params, image()).tokens, want, rtol=1e-5, atol=1e-5)


def test_attention_pooling_is_permutation_invariant_but_not_a_mean():
    pool = pooling.MAPHead(2, 16)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
    abstract = jax.eval_shape(pool.init, jax.random.key(0), x)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda a: jnp.float32(rng.normal(0, 0.5, a.shape)), abstract)
    run = jax.jit(lambda x: pool.apply(params, x, train=False))
    np.testing.assert_allclose(run(x[:, ::-1]), run(x), rtol=1e-4, atol=1e-5)
    doubled = x.at[:, 0].mul(2)
    assert np.abs(run(doubled) - run(x)).max() > 1e-3


def test_patch_dropout_drops_a_fraction_in_training_only():
    tower, params, run = image_tower(patch_dropout=0.5, image_size=16, pool="mean")
    x = image(16)
    assert run(params, x).tokens.shape[1] == 17
    key = jax.random.key(0)
    trained = tower.apply({"params": params}, x, train=True, rngs={"dropout": key}).tokens
    assert trained.shape[1] == 9
    frozen = tower.clone(num_frozen_layers=-1)
    frozen_output = frozen.apply({"params": params}, x, train=True, rngs={"dropout": key})
    np.testing.assert_allclose(frozen_output.pooled, run(params, x).pooled, **CLOSE)


@pytest.mark.parametrize("fields", [dict(pool="cls", class_token=False), dict(patch_size=9)])
def test_inconsistent_vit_fields_are_an_error(fields):
    with pytest.raises(ValueError, match=r"class_token=True|smaller than patch_size=9"):
        models.abstract_tower_params(models.build_tower({**VIT, **fields}))


def test_pixels_after_the_last_full_patch_are_ignored():
    fields = dict(patch_size=3, positions="sincos")  # 2 × 2 patches of 3 pixels: 6 of the 8 pixels
    _, params, run = image_tower(**fields)
    _, _, run_cropped = image_tower(**fields, image_size=6)
    x = image(8)
    got = run(params, x).tokens
    assert got.shape[1] == 5
    np.testing.assert_array_equal(got, run_cropped(params, x[:, :6, :6]).tokens)


def test_an_image_of_another_size_is_an_error():
    _, params, run = image_tower()
    with pytest.raises(ValueError, match="image of 12×12 pixels, but vit has image_size=8"):
        run(params, image(12))


def test_resizing_positions_preserves_a_constant_and_needs_squares():
    constant = np.full((9, 4), 0.5, np.float32)
    np.testing.assert_allclose(positions.resize_pos_embed(constant, 25), 0.5, rtol=1e-6)
    with pytest.raises(ValueError, match="both must be squares"):
        positions.resize_pos_embed(constant, 24)


def test_group_norm_equals_numpy():
    x = np.random.default_rng(0).normal(3, 2, (2, 4, 5, 12)).astype(np.float32)
    norm = conv.GroupNorm(group_size=4)
    params = {"scale": jnp.arange(1.0, 13), "bias": jnp.linspace(-1, 1, 12)}
    groups = x.astype(np.float64).reshape(2, 4, 5, 3, 4)
    mean, var = (f(groups, axis=(1, 2, 4), keepdims=True) for f in (np.mean, np.var))
    want = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    want = want * np.arange(1.0, 13) + np.linspace(-1, 1, 12)
    got = norm.apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_efficientnet_appends_stages_to_the_vector():
    cfg = dict(name="efficientnet_lite", variant="lite0")
    towers = {stages: models.build_tower({**cfg, "pool_stages": stages}) for stages in ((), (5, 1))}
    params = random_params(towers[()], scale=0.1)
    x = image(32)
    plain, with_stages = (
        jax.jit(functools.partial(tower.apply, train=False))({"params": params}, x).pooled
        for tower in towers.values()
    )
    assert plain.shape == (2, 1280)
    # the expanded map of a stage's first block is 6 times as wide as its input: 112 and 16
    assert with_stages.shape == (2, 1280 + 6 * 112 + 6 * 16)
    np.testing.assert_allclose(with_stages[:, :1280], plain, **CLOSE)


@pytest.mark.parametrize("name", ["efficientnet_lite", "resnet"])
def test_a_cnn_with_group_norm_has_norms_and_no_other_biases(name):
    tower = models.build_tower(dict(name=name, norm="group", remat=True))
    paths = param_tree.param_paths(models.abstract_tower_params(tower))
    assert any(path.endswith("norm/scale") for path in paths)
    assert not any(path.endswith("bias") and "norm/" not in path for path in paths)


def test_classify_without_classes_is_an_error():
    tower = models.build_tower(dict(name="efficientnet_lite", variant="lite0"))
    with pytest.raises(ValueError, match="classify needs num_classes"):
        tower.apply({"params": {}}, image(32), method="classify")
