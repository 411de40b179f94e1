"""Generate models_params.txt: the path and shape of every parameter of several towers and models.

    python tests/golden/models_params.py

A changed path breaks checkpoints, locks and weight maps, so it must be a visible diff.
"""

from pathlib import Path

import jax

from imgtune_jax import models, param_tree

GOLDEN = Path(__file__).with_name("models_params.txt")
SIZES = dict(width=8, depth=2, mlp_dim=16, num_heads=2)
VIT = dict(name="vit", image_size=8, patch_size=4, **SIZES)
TEXT = dict(name="text_transformer", vocab_size=10, max_length=6, **SIZES)
DECODER = dict(name="transformer", vocab_size=10, max_length=6, **SIZES)
POOLER = dict(name="attentional", width=8, num_queries=3, num_heads=2)
TOWERS = {
    "vit": VIT,
    "vit clip": {**VIT, "pre_norm": True, "patch_bias": False},
    "vit siglip": {**VIT, "class_token": False, "pool": "attention"},
    "vit registers": {**VIT, "num_registers": 2, "positions": "sincos"},
    "text_transformer": TEXT,
    "text_transformer attention": {**TEXT, "pool": "attention"},
    "text_transformer class": {**TEXT, "pool": "class"},
    "bert": dict(name="bert", vocab_size=10, max_length=6, **SIZES),
    "efficientnet_lite lite0": dict(name="efficientnet_lite", variant="lite0", num_classes=5),
    "efficientnet_lite group": dict(name="efficientnet_lite", variant="lite0", norm="group"),
    "resnet 50": dict(name="resnet", variant="50", num_classes=5),
    "resnet group": dict(name="resnet", stage_sizes=(1, 1), norm="group"),
}
MODELS = {
    "heads linear, mlp": dict(image_head={"name": "linear", "use_bias": True},
                              text_head={"name": "mlp", "hidden_dim": 5, "input_norm": True}),
    "cappa": dict(decoder={**DECODER, "parallel_fraction": 0.5, "context_norm": True}),
    "coca": dict(decoder={**DECODER, "input_from": "text_tower", "cross": "block"},
                 text={**TEXT, "pool": "class"}, image_pooler=POOLER),
    "coca shared": dict(image_pooler={**POOLER, "layout": "shared"}),
    "heads identity": dict(image_head={"name": "identity"}, text_head={"name": "identity"}),
}  # fmt: skip


def lines():
    for name, cfg in TOWERS.items():
        yield f"# {name}"
        tower = models.abstract_tower_params(models.build_tower(cfg))
        yield from param_lines(tower)
    for name, fields in MODELS.items():
        yield f"# {name}"
        cfg = dict(image=VIT, text=TEXT, embed_dim=8, image_size=8, logit_bias_init=0.0)
        params = models.build_model({**cfg, **fields}).abstract_params()
        yield from param_lines({k: x for k, x in params.items() if k not in ("image", "text")})


def param_lines(params):
    shapes = [x.shape for x in jax.tree.leaves(params)]
    for path, shape in zip(param_tree.param_paths(params), shapes, strict=True):
        yield f"{path} {'x'.join(map(str, shape)) or 'scalar'}"


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(lines()) + "\n")
