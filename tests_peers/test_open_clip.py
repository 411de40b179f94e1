"""Conversion from and to open_clip 3.3.0, compared with the installed library."""

import jax.numpy as jnp
import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed

from imgtune_jax import interop, models
from imgtune_jax.models import positions
from tests.golden import interop_open_clip as cases

# The sums of a few layers in float32, in another order.
TOLERANCE = dict(rtol=1e-4, atol=1e-5)

NAMES = (
    "clip",
    "quick_gelu",
    "avg_pool_before_norm",
    "avg_pool_after_norm",
    "bidirectional_last",
    "bidirectional_first",
)


def run_ours(model, params, image, text, mask):
    """Return our image and text embeddings, before they are scaled to unit norm."""
    image = jnp.asarray(image.transpose(0, 2, 3, 1))
    pooled = model.image.apply({"params": params["image"]}, image, train=False).pooled
    image_features = model.image_head.apply({"params": params["image_head"]}, pooled, train=False)
    text, mask = jnp.asarray(text, jnp.int32), jnp.asarray(mask)
    pooled = model.text.apply({"params": params["text"]}, text, mask, train=False).pooled
    head = {"params": params.get("text_head", {})}
    return image_features, model.text_head.apply(head, pooled, train=False)


def convert(name):
    """Return (open_clip's model of a case, our model, its parameters converted from theirs)."""
    theirs = cases.build(name)
    model = models.build_model(
        interop.config_from_open_clip({"embed_dim": 8, **cases.CASES[name][0]})
    )
    return theirs, model, interop.load_open_clip(cases.state_dict(theirs), model)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_open_clip(name):
    assert set(NAMES) == set(cases.CASES)
    theirs, model, params = convert(name)
    inputs = cases.inputs(seed=3)
    expected = cases.outputs(theirs, *inputs[:2])
    image, text = run_ours(model, params, *inputs)
    np.testing.assert_allclose(image, expected["image_features"], **TOLERANCE)
    np.testing.assert_allclose(text, expected["text_features"], **TOLERANCE)
    logits = model.logit_scale(params) * models.unit_norm(image) @ models.unit_norm(text).T
    bias = model.logit_bias(params)
    logits = logits if bias is None else logits + bias
    np.testing.assert_allclose(logits, expected["logits"], **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_exported_folder_has_the_same_outputs_in_open_clip(name, tmp_path):
    """open_clip loads the folder as local-dir:PATH, or for a CustomTextCLIP the state dict."""
    theirs, model, params = convert(name)
    interop.save_open_clip_folder(tmp_path, model, params)
    if cases.CASES[name][1]:  # theirs is a CustomTextCLIP, which has a separate text module
        exported = open_clip.CustomTextCLIP(
            output_dict=True, **interop.config_to_open_clip(model)
        ).eval()
        state = interop.save_open_clip(params, model, custom_text=True)
        exported.load_state_dict({k: torch.from_numpy(x.copy()) for k, x in state.items()})
    else:
        exported = open_clip.create_model(f"local-dir:{tmp_path}", output_dict=True).eval()
    image, text, _ = cases.inputs(seed=4)
    for key, expected in cases.outputs(theirs, image, text).items():
        actual = cases.outputs(exported, image, text)[key]
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6, err_msg=key)


def test_exported_folder_contains_the_preprocessing(tmp_path):
    _, model, params = convert("quick_gelu")
    interop.save_open_clip_folder(tmp_path, model, params)
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    normalize = preprocess.transforms[-1]
    np.testing.assert_allclose(np.multiply(255, normalize.mean), model.image_mean, rtol=1e-6)
    np.testing.assert_allclose(np.multiply(255, normalize.std), model.image_std, rtol=1e-6)


@pytest.mark.parametrize(("old", "new"), [(7, 14), (14, 7), (4, 6)])
def test_resized_positions_equal_open_clip(old, new):
    rng = np.random.default_rng(0)
    grid = rng.normal(size=(old * old, 8)).astype(np.float32)
    state = {"visual.positional_embedding": torch.from_numpy(np.concatenate([grid[:1], grid]))}

    class Model:
        class visual:
            grid_size = (new, new)

    resize_pos_embed(state, Model)
    expected = state["visual.positional_embedding"][1:].numpy()
    np.testing.assert_allclose(
        positions.resize_pos_embed(grid, new * new), expected, rtol=1e-4, atol=2e-5
    )
