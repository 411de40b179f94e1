"""Converted open_clip models have the outputs that tests/golden/interop_open_clip.py saved."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax import interop, models, param_tree
from imgtune_jax.errors import UserError
from imgtune_jax.types import Batch

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "interop_open_clip.npz")
CASES = sorted({name.partition("/")[0] for name in GOLDEN.files if "/" in name})
# PyTorch sums in another order, in float32, over a few layers.
TOLERANCE = dict(rtol=1e-4, atol=1e-5)


def case(name):
    """Return (open_clip config, whether the model is a CustomTextCLIP, state dict)."""
    cfg = json.loads(str(GOLDEN[f"{name}/cfg"]))
    custom = cfg.pop("custom")
    prefix = f"{name}/state/"
    names = [n for n in GOLDEN.files if n.startswith(prefix)]
    return cfg, custom, {n.removeprefix(prefix): GOLDEN[n] for n in names}


def embed(model, params):
    """Return the unnormalized embeddings of the saved images and texts."""
    image = jnp.asarray(GOLDEN["image"].transpose(0, 2, 3, 1))
    text, mask = jnp.asarray(GOLDEN["text"], jnp.int32), jnp.asarray(GOLDEN["text_mask"])
    pooled = model.image.apply({"params": params["image"]}, image, train=False).pooled
    image_features = model.image_head.apply({"params": params["image_head"]}, pooled, train=False)
    pooled = model.text.apply({"params": params["text"]}, text, mask, train=False).pooled
    head = {"params": params.get("text_head", {})}
    return image_features, model.text_head.apply(head, pooled, train=False)


@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_those_of_open_clip(name):
    cfg, _, state = case(name)
    model = models.build_model(interop.config_from_open_clip(cfg))
    params = interop.load_open_clip(state, model)
    image, text = embed(model, params)
    np.testing.assert_allclose(image, GOLDEN[f"{name}/image_features"], **TOLERANCE)
    np.testing.assert_allclose(text, GOLDEN[f"{name}/text_features"], **TOLERANCE)
    image, text = models.unit_norm(image), models.unit_norm(text)
    logits = model.logit_scale(params) * image @ text.T
    if (bias := model.logit_bias(params)) is not None:
        logits = logits + bias
    np.testing.assert_allclose(logits, GOLDEN[f"{name}/logits"], **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_import_then_export_returns_the_same_weights(name):
    cfg, custom, state = case(name)
    model = models.build_model(interop.config_from_open_clip(cfg))
    exported = interop.save_open_clip(
        interop.load_open_clip(state, model), model, custom_text=custom
    )
    assert exported.keys() == state.keys()
    merged = ("visual.class_embedding", "visual.positional_embedding")
    for key in state.keys() - set(merged):
        np.testing.assert_array_equal(exported[key], state[key], err_msg=key)
    # The class token's position is added to the token on import, so only their sum is equal.
    token, position = merged
    sums = [weights[token] + weights[position][0] for weights in (state, exported)]
    np.testing.assert_array_equal(*sums)
    np.testing.assert_array_equal(exported[position][1:], state[position][1:])


def test_exported_folder_loads_as_the_same_model(tmp_path):
    cfg, _, state = case("quick_gelu")
    model = models.build_model(interop.config_from_open_clip(cfg))
    params = interop.load_open_clip(state, model)
    interop.save_open_clip_folder(tmp_path, model, params)
    loaded_cfg, loaded_params, preprocess = interop.load_open_clip_folder(tmp_path)
    loaded = models.build_model(loaded_cfg)
    assert (loaded.image, loaded.text) == (model.image, model.text)
    np.testing.assert_allclose(loaded.image_mean, model.image_mean, rtol=1e-7)
    assert [transform["name"] for transform in preprocess] == ["resize", "center_crop"]
    embeddings = zip(embed(model, params), embed(loaded, loaded_params), strict=True)
    for expected, actual in embeddings:
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_one_tower_loads_from_the_file_of_a_full_model(modality, tmp_path):
    cfg, _, state = case("clip")
    full = interop.config_from_open_clip(cfg)
    np.savez(tmp_path / "model.npz", **state)
    init = dict(format="open_clip", path=str(tmp_path / "model.npz"))
    tower = interop.load_tower(init, full[modality], image_size=8)
    expected = interop.load_open_clip(state, models.build_model(full))[modality]
    assert param_tree.param_paths(tower) == param_tree.param_paths(expected)
    for path, x in param_tree.flatten(expected).items():
        np.testing.assert_array_equal(param_tree.flatten(tower)[path], x)


def test_error_lists_all_bad_keys():
    cfg, _, state = case("clip")
    model = models.build_model(interop.config_from_open_clip(cfg))
    del state["ln_final.weight"]
    state["visual.novelty"] = np.zeros(3)
    state["token_embedding.weight"] = np.zeros((41, 16))
    state["visual.transformer.resblocks.0.attn.in_proj_weight"] = np.zeros((47, 16))
    with pytest.raises(ValueError) as error:
        interop.load_open_clip(state, model)
    for message in (
        "missing: ln_final.weight",
        "unexpected: visual.novelty",
        "(41, 16)",
        "(47, 16)",
    ):
        assert message in str(error.value)


def test_quick_gelu_weights_have_other_outputs_with_gelu():
    """This is why the converted config includes the activation."""
    cfg, _, state = case("quick_gelu")
    quick_gelu = models.build_model(interop.config_from_open_clip(cfg))
    gelu = models.build_model(interop.config_from_open_clip({**cfg, "quick_gelu": False}))
    params = interop.load_open_clip(state, quick_gelu)
    difference = np.abs(np.subtract(embed(quick_gelu, params)[0], embed(gelu, params)[0])).max()
    assert difference > 1e-3


def test_unsupported_feature_is_an_error():
    cfg, _, _ = case("clip")
    cfg["vision_cfg"] = {**cfg["vision_cfg"], "ls_init_value": 1e-5, "qk_norm": False}
    with pytest.raises(ValueError, match="ls_init_value=1e-05") as error:
        interop.config_from_open_clip(cfg)
    assert "qk_norm" not in str(error.value)  # its value is False, so the feature is unused


def test_position_embeddings_are_resized_to_another_image_size(tmp_path):
    cfg, _, state = case("clip")
    cfg["vision_cfg"] = {**cfg["vision_cfg"], "image_size": 16}
    model = models.build_model(interop.config_from_open_clip(cfg))
    params = interop.load_open_clip(state, model)
    assert params["image"]["pos_embed"].shape == (16, 16)
    batch = Batch(jnp.ones(1, bool), image=jnp.zeros((1, 16, 16, 3), jnp.uint8))
    assert np.isfinite(model.apply(params, batch).image_emb).all()


def test_prefix_that_all_names_share_is_removed():
    cfg, _, state = case("clip")
    model = models.build_model(interop.config_from_open_clip(cfg))
    prefixed = interop.load_open_clip({f"module.{n}": x for n, x in state.items()}, model)
    expected = param_tree.flatten(interop.load_open_clip(state, model))
    for path, x in param_tree.flatten(prefixed).items():
        np.testing.assert_array_equal(x, expected[path])


@pytest.mark.parametrize("modality", ["image", "text"])
def test_openai_weights_with_another_activation_are_refused(modality):
    """Only OpenAI's state dicts have input_resolution, and they need quick_gelu (open_clip#771)."""
    cfg, _, state = case("clip")
    state["input_resolution"] = np.array(8)
    full = interop.config_from_open_clip(cfg)
    tower = models.build_tower(full[modality], **({"image_size": 8} if modality == "image" else {}))
    expected = models.abstract_tower_params(tower)
    with pytest.raises(UserError, match="act = 'gelu'; these are OpenAI's weights"):
        interop.load_open_clip_tower(state, tower, expected)
    assert interop.load_open_clip_tower(state, tower.clone(act="quick_gelu"), expected)


def test_weights_that_are_not_finite_are_refused_by_name():
    cfg, _, state = case("clip")
    model = models.build_model(interop.config_from_open_clip(cfg))
    state["visual.proj"] = np.full_like(state["visual.proj"], np.nan)
    with pytest.raises(UserError, match="not finite: image_head/kernel"):
        interop.load_open_clip(state, model)


@pytest.mark.parametrize("bias", [dict(use_bias=False), dict(vocab_bias=True)])
def test_export_of_a_decoder_with_other_biases_than_open_clips_is_an_error(bias):
    sizes = dict(width=16, depth=1, mlp_dim=64, num_heads=2, norm_epsilon=1e-5, act="gelu")
    text = dict(sizes, vocab_size=10, max_length=6)
    cfg = dict(
        image=dict(
            sizes, name="vit", patch_size=4, pre_norm=True, patch_bias=False, final_norm="none"
        ),
        image_pooler=dict(name="attentional", layout="shared", width=16, norm_epsilon=1e-5),
        text=dict(text, name="text_transformer", pool="class", shifted_class_mask=True),
        decoder=dict(text, name="transformer", input_from="text_tower", cross="block"),
        image_size=8,
        embed_dim=16,
    )
    assert "multimodal_cfg" in interop.config_to_open_clip(models.build_model(cfg))
    cfg["decoder"] |= bias
    with pytest.raises(ValueError, match=rf"decoder\.{next(iter(bias))} = "):
        interop.config_to_open_clip(models.build_model(cfg))
