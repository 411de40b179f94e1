"""Make towers_outputs.json: what a feature cache stores of several towers with fixed parameters.

    python -m tests.golden.towers_outputs

A cache may serve features that another version of the code computed, so a changed output needs
another `models.TOWERS_VERSION`.
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np

from imgtune_jax import models
from imgtune_jax.types import Batch

GOLDEN = Path(__file__).with_name("towers_outputs.json")
NUM_VALUES = 12  # stored per tower
SIZES = dict(width=8, depth=2, mlp_dim=16, num_heads=2)
VIT = dict(name="vit", image_size=8, patch_size=4, **SIZES)
TEXT = dict(name="text_transformer", vocab_size=10, max_length=6, **SIZES)
IMAGE_TOWERS = {
    "vit": VIT,
    "vit clip": {**VIT, "pre_norm": True, "patch_bias": False, "act": "quick_gelu"},
    "vit siglip": {**VIT, "class_token": False, "pool": "attention"},
    "vit registers": {**VIT, "num_registers": 2, "positions": "sincos", "scan": True},
    "vit bfloat16": {**VIT, "dtype": "bfloat16"},
    "efficientnet_lite": dict(name="efficientnet_lite", variant="lite0"),
    "resnet": dict(name="resnet", stage_sizes=(1, 1), width=8),
    "resnet group": dict(name="resnet", stage_sizes=(1, 1), width=16, norm="group"),
}
TEXT_TOWERS = {
    "text_transformer": TEXT,
    "text_transformer causal": {**TEXT, "causal": True, "pool": "last"},
    "text_transformer attention": {**TEXT, "pool": "attention"},
    "text_transformer class": {**TEXT, "pool": "class"},
    "bert": dict(name="bert", vocab_size=10, max_length=6, **SIZES),
}


def outputs():
    """Return {"tower": values of its full output, "tower prefix": values after one layer}."""
    values = {}
    for name, cfg in IMAGE_TOWERS.items():
        values |= tower_outputs("image", name, image=cfg, text=TEXT)
    for name, cfg in TEXT_TOWERS.items():
        values |= tower_outputs("text", name, image=VIT, text=cfg)
    return values


def tower_outputs(tower, name, **cfg):
    model = models.build_model(dict(**cfg, embed_dim=8, image_size=8))
    params = fixed_params(model.abstract_params())
    locks = {name: lambda path: True}
    if name in ("vit", "text_transformer"):
        locks[f"{name} prefix"] = lambda path: (
            not path.startswith((f"{tower}/blocks_1", f"{tower}/norm", f"{tower}/pool"))
        )
    return {key: sample(model.freeze(is_frozen), params, tower) for key, is_frozen in locks.items()}


def fixed_params(abstract):
    """Return parameters that depend on shapes only, not on initializers and random generators."""
    leaves, tree = jax.tree.flatten(abstract)
    filled = [
        (0.4 * np.sin(np.arange(x.size) * 0.7 + i)).reshape(x.shape).astype(np.float32)
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, filled)


def sample(model, params, tower):
    """Return some of the values that the cache stores for two examples."""
    text_mask = np.arange(6)[None] < np.array([[4], [6]])
    batch = Batch(
        example_mask=np.ones(2, bool),
        image=(np.arange(2 * 8 * 8 * 3) * 37 % 256).astype(np.uint8).reshape(2, 8, 8, 3),
        text=np.where(text_mask, np.arange(12).reshape(2, 6) % 9 + 1, 0).astype(np.int32),
        text_mask=text_mask,
    )
    apply = jax.jit(functools.partial(model.apply_frozen_prefix, tower=tower))
    out = np.asarray(apply(params, batch=batch), np.float64).ravel()
    return out[np.linspace(0, out.size - 1, NUM_VALUES).astype(int)].tolist()


def tolerance(name):
    """Return the relative difference that is rounding. bfloat16 has a precision of 2⁻⁸."""
    return 4e-3 if "bfloat16" in name else 1e-4


def differing(old, new):
    """Return the names of towers whose outputs differ by more than rounding."""
    close = {
        name: np.allclose(new[name], values, rtol=tolerance(name), atol=tolerance(name) / 10)
        for name, values in old.items()
        if name in new
    }
    return sorted(name for name, is_close in close.items() if not is_close)


if __name__ == "__main__":
    new = outputs()
    if GOLDEN.exists():
        old = json.loads(GOLDEN.read_text())
        changed = differing(old["outputs"], new)
        if changed and old["version"] == models.TOWERS_VERSION:
            raise SystemExit(f"{changed} changed; increase models.TOWERS_VERSION first")
    golden = {"version": models.TOWERS_VERSION, "outputs": new}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
