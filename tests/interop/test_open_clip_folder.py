"""The files in an open_clip folder are compared with the config that loads its weights."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from imgtune_jax import data, interop, models
from imgtune_jax.errors import UserError
from imgtune_jax.interop import image_preprocessing

MODEL = dict(
    embed_dim=8,
    quick_gelu=True,
    vision_cfg=dict(layers=1, width=8, head_width=4, patch_size=4, image_size=8),
    text_cfg=dict(layers=1, width=8, heads=2, vocab_size=11, context_length=6),
)
PREPROCESS = dict(
    size=[8, 8], mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.1], interpolation="bicubic",
    resize_mode="shortest",
)  # fmt: skip
TRANSFORMS = (
    dict(name="resize", size=8, mode="shortest", interpolation="bicubic"),
    dict(name="center_crop", size=8),
)


@pytest.fixture
def folder(tmp_path):
    """A folder with random weights."""
    cfg = interop.config_from_open_clip(MODEL, PREPROCESS)
    model = models.build_model(cfg)
    params = model.init(jax.random.key(0))
    interop.save_open_clip_folder(tmp_path, model, params)
    rewrite_config(tmp_path)
    return tmp_path


def rewrite_config(folder, **preprocess):
    config = dict(model_cfg=MODEL, preprocess_cfg=PREPROCESS | preprocess)
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def load_tower(folder, modality, ignore=(), tower=None, **image):
    """Load one tower with the config of the folder, changed by `tower` and `image`."""
    cfg = interop.config_from_open_clip(MODEL, PREPROCESS)
    init = dict(format="open_clip", path=folder, ignore=ignore)
    given = dict(
        image_size=8, image_mean=cfg["image_mean"], image_std=cfg["image_std"],
        preprocess=TRANSFORMS,
    )  # fmt: skip
    return interop.load_tower(init, cfg[modality] | (tower or {}), **given | image)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_tower_with_the_config_of_the_folder_loads(folder, modality):
    assert load_tower(folder, modality)


@pytest.mark.parametrize(
    ("modality", "changes", "message"),
    [
        ("image", dict(act="gelu"), "act: 'quick_gelu' in open_clip_config.json, 'gelu'"),
        ("image", dict(num_heads=4), "num_heads: 2 in open_clip_config.json, 4"),
        ("image", dict(pool="mean"), "pool: 'cls' in open_clip_config.json, 'mean'"),
        ("text", dict(act="gelu_tanh"), "act: 'quick_gelu' in open_clip_config.json, 'gelu_tanh'"),
        ("text", dict(norm_epsilon=1e-6), "norm_epsilon: 1e-05 in open_clip_config.json, 1e-06"),
        ("text", dict(causal=False), "causal: True in open_clip_config.json, False"),
        ("text", dict(pool="last"), "pool: 'eot' in open_clip_config.json, 'last'"),
    ],
)
def test_tower_that_contradicts_the_folder_is_an_error(folder, modality, changes, message):
    with pytest.raises(UserError) as error:
        load_tower(folder, modality, tower=changes)
    assert message in str(error.value)
    assert load_tower(folder, modality, tower=changes, ignore=tuple(changes))


def test_padding_mask_of_a_causal_tower_may_differ_since_it_changes_no_output(folder):
    assert load_tower(folder, "text", tower=dict(mask_padding=True))


@pytest.mark.parametrize(
    ("field", "image", "message"),
    [
        ("image_mean", dict(image_mean=(127.5,) * 3), "image_mean: (127.5, 102.0, 76.5) in"),
        ("image_std", dict(image_std=(127.5,) * 3), "image_std: (51.0, 51.0, 25.5) in"),
        ("image_size", dict(image_size=16), "image_size: 8 in open_clip_config.json, 16"),
        ("preprocess.mode", dict(preprocess=[dict(name="resize", size=8)]),
         "preprocess.mode: 'shortest' in open_clip_config.json, 'squash'"),
        ("preprocess.interpolation",
         dict(preprocess=[dict(TRANSFORMS[0], interpolation="bilinear")]),
         "preprocess.interpolation: 'bicubic' in open_clip_config.json, 'bilinear'"),
        ("preprocess.mode", dict(preprocess=[dict(name="center_crop", size=8)]),
         "preprocess.mode: 'shortest' in open_clip_config.json, None"),
    ],
    ids=["mean", "std", "size", "mode", "interpolation", "no resize"],
)  # fmt: skip
def test_images_that_contradict_the_folder_are_an_error(folder, field, image, message):
    with pytest.raises(UserError) as error:
        load_tower(folder, "image", **image)
    assert message in str(error.value)
    assert load_tower(folder, "image", ignore=(field, "preprocess.interpolation"), **image)
    assert load_tower(folder, "text", **image)


def test_rounded_mean_is_not_a_contradiction(folder):
    rewrite_config(folder, mean=[0.48145466, 0.4578275, 0.40821073])
    assert load_tower(folder, "image", image_mean=(122.77, 116.75, 104.09))


def test_processor_config_of_transformers_is_compared_with_the_images(folder):
    (folder / "open_clip_config.json").unlink()
    processor = dict(
        do_normalize=True, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.1], resample=3,
        size=dict(shortest_edge=8), do_center_crop=True, crop_size=dict(height=8, width=8),
    )  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    assert load_tower(folder, "image")
    with pytest.raises(UserError, match=r"preprocess\.interpolation: 'bicubic' in preprocessor_"):
        load_tower(folder, "image", preprocess=[dict(TRANSFORMS[0], interpolation="lanczos")])


def test_loaded_folder_includes_its_preprocessing(folder):
    rewrite_config(folder, resize_mode="longest", interpolation="bilinear", fill_color=7)
    loaded = interop.load_open_clip_folder(folder)
    image = np.full((2, 4, 3), 200, np.uint8)
    transformed = data.build_transform(loaded.preprocess)(Image.fromarray(image))
    assert transformed.shape == (8, 8, 3)
    assert (transformed[:2] == 7).all() and (transformed[2:6] == 200).all()
    assert loaded.model["image_size"] == 8 and loaded.params.keys() >= {"image", "text"}


def test_unknown_resize_mode_is_an_error():
    with pytest.raises(UserError, match="resize_mode = 'tile'"):
        image_preprocessing.open_clip_transforms(dict(resize_mode="tile"), image_size=8)
    with pytest.raises(UserError, match=r"size = \(8, 4\)"):
        image_preprocessing.open_clip_transforms(dict(size=[8, 4]), image_size=8)


def test_config_without_a_model_is_an_error(folder):
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match="has no model_cfg"):
        interop.load_open_clip_folder(folder)
