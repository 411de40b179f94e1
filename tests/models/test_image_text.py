"""Properties of an image-text model: its outputs, its frozen parts, its errors."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax import models, param_tree, xla_cpu
from imgtune_jax.locking import FrozenPrefix
from imgtune_jax.models import image_text
from imgtune_jax.types import MODALITIES, Batch

SIZES = dict(width=16, depth=2, mlp_dim=16, num_heads=2)
CFG = dict(
    image=dict(name="vit", patch_size=4, dropout=0.5, **SIZES),
    text=dict(name="text_transformer", vocab_size=20, max_length=6, dropout=0.5, **SIZES),
    image_head=dict(name="mlp", hidden_dim=8, dropout=0.5),
    text_head=dict(name="linear"),
    embed_dim=12,
    image_size=8,
    image_mean=(127.0, 127.0, 127.0),
    image_std=(128.0, 128.0, 128.0),
)


@pytest.fixture(scope="module")
def model():
    return models.build_model(CFG)


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


def batch(**fields):
    rng = np.random.default_rng(0)
    text = jnp.asarray(rng.integers(1, 20, (3, 6)), jnp.int32)
    image = jnp.asarray(rng.integers(0, 256, (3, 8, 8, 3)), jnp.uint8)
    values = dict(image=image, text=text, text_mask=jnp.ones((3, 6), bool))
    return Batch(example_mask=jnp.ones(3, bool), **{**values, **fields})


def test_embeddings_have_unit_norm_and_equal_encode_image_and_encode_text(model, params):
    b = batch()
    out = jax.jit(model.apply)(params, b)
    for x in (out.image_emb, out.text_emb):
        assert x.shape == (3, 12) and x.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(out.image_emb, model.encode_image(params, b.image), atol=1e-6)
    encoded = model.encode_text(params, b.text, b.text_mask)
    np.testing.assert_allclose(out.text_emb, encoded, atol=1e-6)


def test_cached_features_replace_the_image_tower(model, params):
    """The parameters of the tower may then be absent."""
    b = batch()
    want = jax.jit(model.apply)(params, b)
    features = model.image_features(params, b.image)
    assert features.shape == (3, model.feature_dim())
    other_params = {name: tree for name, tree in params.items() if name != "image"}
    got = jax.jit(model.apply)(other_params, batch(image=None, image_features=features))
    np.testing.assert_allclose(got.image_emb, want.image_emb, atol=1e-6)
    np.testing.assert_allclose(got.text_emb, want.text_emb, atol=1e-6)


def test_absent_parameters_are_named_in_the_error(model, params):
    other_params = {name: tree for name, tree in params.items() if name != "image"}
    with pytest.raises(ValueError, match="applies the component 'image', but the parameters hold"):
        model.apply(other_params, batch())


def test_images_are_normalized_in_units_of_255(model, params):
    x = np.full((1, 8, 8, 3), 255, np.uint8)
    want = model.image.apply(
        {"params": params["image"]}, jnp.full((1, 8, 8, 3), 1.0), train=False
    ).pooled
    np.testing.assert_allclose(model.image_features(params, jnp.asarray(x)), want, atol=1e-6)


def test_a_batch_of_one_modality_has_one_embedding(model, params):
    out = model.apply(params, batch(image=None))
    assert out.image_emb is None and out.text_emb is not None
    out = model.apply(params, batch(text=None, text_mask=None))
    assert out.text_emb is None and out.image_emb is not None


def test_text_without_its_mask_is_an_error(model, params):
    with pytest.raises(ValueError, match="needs its text_mask"):
        model.apply(params, batch(text_mask=None))


@pytest.mark.parametrize(
    ("frozen_paths", "frozen", "num_frozen_layers"),
    [
        ((), set(), (0, 0)),
        (("image/",), {"image"}, (-1, 0)),
        (("image/", "image_head/", "text/"), {"image", "image_head", "text"}, (-1, -1)),
        (("text/token_embed", "text/pos_embed", "text/blocks_0"), set(), (0, 1)),
        (("text/token_embed", "text/pos_embed", "text/blocks_"), set(), (0, 2)),
        (("text/blocks_0",), set(), (0, 0)),  # the embeddings before it are trainable
        (
            ("text/token_embed", "text/pos_embed", "text/blocks_1"),
            set(),
            (0, 0),
        ),  # blocks_0 is trainable
    ],
)
def test_frozen_parts_are_set_to_eval_mode(model, frozen_paths, frozen, num_frozen_layers):
    locked = model.freeze(lambda path: path.startswith(frozen_paths))
    assert locked.frozen == frozen
    towers = (locked.image, locked.text)
    assert tuple(tower.num_frozen_layers for tower in towers) == num_frozen_layers


def test_only_the_tower_that_trains_has_dropout(model, params):
    locked = model.freeze(lambda path: path.startswith(("image/", "image_head/")))
    run = jax.jit(lambda p, b, k: locked.apply(p, b, rng=k, train=True))
    # unsafe_rbg, since each sample from threefry takes most of a second to compile on a CPU.
    outs = [run(params, batch(), jax.random.key(i, impl="unsafe_rbg")) for i in (0, 1)]
    np.testing.assert_array_equal(outs[0].image_emb, outs[1].image_emb)
    assert np.abs(outs[0].text_emb - outs[1].text_emb).max() > 1e-3
    evaluated = model.apply(params, batch())
    np.testing.assert_allclose(outs[0].image_emb, evaluated.image_emb, atol=1e-6)


def test_clamped_scale_can_return_below_the_maximum():
    """With `jnp.minimum`, the gradient above the maximum would be zero."""
    value, gradient = jax.value_and_grad(lambda t, s: s * image_text.clamp_log_scale(t, 4.6))(
        5.0, 1
    )
    assert value == np.float32(4.6) and gradient == 1  # gradient descent lowers t
    assert (
        jax.grad(lambda t: -image_text.clamp_log_scale(t, 4.6))(5.0) == 0
    )  # no gradient that would raise t
    assert jax.grad(lambda t: -image_text.clamp_log_scale(t, 4.6))(4.5) == -1


def test_scale_is_the_multiplier_clamped_at_100(model, params):
    assert model.logit_bias(params) is None
    high = {**params, "logit_scale": jnp.float32(7.0)}
    np.testing.assert_allclose(model.logit_scale(high), 100, rtol=1e-6)
    unclamped = dataclasses.replace(model, logit_scale_max=None)
    np.testing.assert_allclose(unclamped.logit_scale(high), np.exp(7), rtol=1e-6)


def test_unit_norm_of_zero_is_zero_with_a_finite_gradient():
    value, gradient = jax.value_and_grad(lambda x: models.unit_norm(x).sum())(jnp.zeros((1, 4)))
    assert value == 0 and np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(embed_dims=3), "model has no field 'embed_dims'; did you mean 'embed_dim'"),
        (
            dict(image=dict(name="vit", patchsize=4)),
            "tower 'vit' has no field 'patchsize'; did you mean 'patch_size'",
        ),
        (dict(image=dict(name="vitt")), "tower: name = 'vitt'; expected one of vit,"),
        (dict(text_head=dict(name="linear", bias=True)), "text_head 'linear' has no field 'bias'"),
        (dict(image=dict(name="vit", variant="Q/16")), "vit has no variant 'Q'"),
        (dict(image=dict(name="vit", variant="B16")), "expected SIZE/PATCH"),
        (dict(dtype="float16"), "dtype = 'float16'; expected one of float32, bfloat16"),
        (dict(image=dict(name="vit", image_size=9)), "image_size=9, but the model's is 8"),
    ],
)
def test_an_invalid_field_is_an_error_that_states_the_valid_ones(change, message):
    with pytest.raises(ValueError, match=message):
        models.build_model({**CFG, **change})


def test_missing_fields_are_named():
    with pytest.raises(ValueError, match="no image tower"):
        models.build_model(dict(text=CFG["text"]))
    with pytest.raises(ValueError, match="neither text nor decoder"):
        models.build_model(dict(image=CFG["image"]))
    with pytest.raises(ValueError, match="no embed_dim"):
        models.build_model(dict(image=CFG["image"], text=CFG["text"]))


def test_identity_head_checks_the_width():
    cfg = {**CFG, "text_head": dict(name="identity")}
    with pytest.raises(ValueError, match="returns 16 features, embed_dim is 12"):
        models.build_model(cfg).abstract_params()


def test_bf16_model_keeps_float32_parameters_and_outputs(params):
    low = models.build_model({**CFG, "dtype": "bfloat16"})
    out = low.apply(params, batch())
    assert out.image_emb.dtype == jnp.float32
    exact = models.build_model(CFG).apply(params, batch())
    np.testing.assert_allclose(
        out.image_emb, exact.image_emb, atol=0.05
    )  # bf16 has 8 significant bits
    assert np.abs(out.image_emb - exact.image_emb).max() > 0


def test_every_residual_stream_is_constrained():
    constrained = []

    class Recorder:
        def constrain(self, x, axes):
            constrained.append((x.ndim, axes))
            return x

    model = models.build_model(CFG, Recorder())
    abstract = model.abstract_params()
    constrained.clear()
    jax.eval_shape(model.apply, abstract, batch())
    assert (
        constrained == [(3, ("batch", "length", "embed"))] * 6
    )  # embeddings and 2 layers of 2 towers


def test_a_cnn_on_chunks_of_a_batch_equals_the_cnn_on_the_full_batch(monkeypatch):
    cfg = CFG | dict(image=dict(name="efficientnet_lite", variant="lite0"), image_size=32)
    model = models.build_model(cfg)
    params = model.init(jax.random.key(0))
    size = xla_cpu.CONV_BATCH
    x = np.random.default_rng(0).integers(0, 256, (3 * size, 32, 32, 3), np.uint8)
    at_once = jax.jit(lambda p, x: model.image_features(p, x))
    assert "while" not in at_once.lower(params, x).as_text()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    in_chunks = jax.jit(model.image_features)
    assert "while" in in_chunks.lower(params, x).as_text()
    np.testing.assert_allclose(in_chunks(params, x), at_once(params, x), rtol=1e-5, atol=1e-6)


def test_frozen_prefix_and_suffix_equal_the_full_tower(model):
    """Both towers are split after the first layer."""
    locked = model.freeze(lambda path: not re.search("head|blocks_1|final_norm|pool|logit", path))
    assert [locked.frozen_prefix(t) for t in MODALITIES] == [FrozenPrefix(1)] * 2
    params = model.init(jax.random.key(1))
    b = batch()
    features = {t: locked.apply_frozen_prefix(params, tower=t, batch=b) for t in MODALITIES}
    cached = b.replace(image=None, image_features=features["image"], text_features=features["text"])
    suffix_params = {
        t: {k: v for k, v in params[t].items() if not locked.in_frozen_prefix(f"{t}/{k}")}
        for t in MODALITIES
    }
    assert "blocks_0" not in suffix_params["image"] and "blocks_1" in suffix_params["image"]
    got, want = locked.apply(params | suffix_params, cached), locked.apply(params, b)
    np.testing.assert_allclose(got.image_emb, want.image_emb, rtol=1e-6)
    np.testing.assert_allclose(got.text_emb, want.text_emb, rtol=1e-6)


@pytest.mark.parametrize(
    "image",
    [
        CFG["image"],
        dict(name="efficientnet_lite", variant="lite0"),
        dict(name="resnet", stage_sizes=(1, 1), width=8),
    ],
    ids=lambda image: image["name"],
)
def test_cast_frozen_kernels_does_not_change_values(image):
    model = models.build_model({**CFG, "image": image, "image_size": 32, "dtype": "bfloat16"})
    params = model.init(jax.random.key(0))
    cast = model.cast_frozen_kernels(params)
    dtypes = {path.split("/")[-1]: set() for path in param_tree.param_paths(params)}
    for path, x in zip(param_tree.param_paths(cast), jax.tree.leaves(cast), strict=True):
        dtypes[path.split("/")[-1]].add(x.dtype.name)
    assert "bfloat16" in dtypes.pop("kernel")
    assert set.union(*dtypes.values()) == {"float32"}
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)), jnp.uint8)
    out, want = (jax.jit(model.apply)(p, batch(image=images)) for p in (cast, params))
    np.testing.assert_array_equal(out.image_emb, want.image_emb)
    np.testing.assert_array_equal(out.text_emb, want.text_emb)


def test_cast_frozen_kernels_of_a_float32_model_changes_nothing(model, params):
    jax.tree.map(np.testing.assert_array_equal, model.cast_frozen_kernels(params), params)
    assert {x.dtype for x in jax.tree.leaves(model.cast_frozen_kernels(params))} == {
        jnp.dtype("float32")
    }
