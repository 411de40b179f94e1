"""Make interop_open_clip.npz: random tiny open_clip models, their inputs and outputs.

    pip install -r tests_peers/requirements.txt && python -m tests.golden.interop_open_clip

The file was made with open-clip-torch 3.3.0 and torch 2.13.0. `tests_peers/test_open_clip.py`
compares the same cases with the installed open_clip.
"""

import json
from pathlib import Path

import numpy as np
import torch

from benchmarks import peers

open_clip = peers.open_clip()

GOLDEN = Path(__file__).with_name("interop_open_clip.npz")
VOCAB, LENGTH, EOT = 40, 7, 39  # EOT: id of the end-of-text token

VISION = dict(layers=2, width=16, head_width=8, patch_size=4, image_size=8)
TEXT = dict(context_length=LENGTH, vocab_size=VOCAB, width=16, heads=4, layers=2)
TANH = dict(act_kwargs=dict(approximate="tanh"), norm_kwargs=dict(eps=1e-6))

# name -> (model config, whether the text tower is a separate module, as in CustomTextCLIP)
CASES = {
    "clip": (dict(vision_cfg=VISION, text_cfg=TEXT), False),
    "quick_gelu": (
        dict(
            vision_cfg={**VISION, "head_width": 4, "patch_size": 2, "mlp_ratio": 2.0},
            text_cfg={**TEXT, "heads": 2, "layers": 3, "width": 12},
            quick_gelu=True,
        ),
        False,
    ),
    "avg_pool_before_norm": (
        dict(
            vision_cfg={**VISION, "pool_type": "avg", "final_ln_after_pool": True},
            text_cfg={**TEXT, "pool_type": "eos", "eos_id": EOT},
        ),
        False,
    ),
    "avg_pool_after_norm": (
        dict(
            vision_cfg={**VISION, **TANH, "pool_type": "avg", "no_ln_pre": True},
            text_cfg={**TEXT, **TANH},
        ),
        True,
    ),
    "bidirectional_last": (
        dict(
            vision_cfg={**VISION, "pos_embed_type": "sin_cos_2d"},
            text_cfg={**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
            init_logit_bias=-10.0,
            init_logit_scale=float(np.log(10)),
        ),
        True,
    ),
    "bidirectional_first": (
        dict(
            vision_cfg=VISION,
            text_cfg={
                **{**TEXT, "width": 8, "heads": 2},
                **dict(no_causal_mask=True, pool_type="first", proj_type="none"),
            },
        ),
        True,
    ),
}


def build(name):
    """Build a case's model with random parameters. Defaults of 0 and 1 would hide mistakes."""
    cfg, custom = CASES[name]
    model_class = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model = model_class(embed_dim=8, output_dict=True, **cfg).eval()
    rng = np.random.default_rng(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.startswith("logit"):
                continue
            noise = rng.normal(0, 0.2, tuple(parameter.shape)).astype(np.float32)
            is_norm_scale = key.endswith("weight") and ".ln_" in f".{key}"
            parameter.copy_(torch.from_numpy(noise + is_norm_scale))
    return model


def inputs(seed=0, n=5):
    """Sample (images [n c h w], token ids, mask). The texts have different lengths."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(n, 3, 8, 8)).astype(np.float32)
    text = rng.integers(1, EOT, (n, LENGTH))
    length = rng.integers(2, LENGTH + 1, n)
    for row, stop in zip(text, length, strict=True):
        row[stop - 1], row[stop:] = EOT, 0
    return image, text, np.arange(LENGTH) < length[:, None]


def outputs(model, image, text):
    """Return the unnormalized embeddings and the logits."""
    with torch.no_grad():
        image, text = torch.from_numpy(image), torch.from_numpy(text)
        image_features, text_features = model.encode_image(image), model.encode_text(text)
        out = model(image, text)
        logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
        logits = logits + out.get("logit_bias", 0.0)
    return dict(
        image_features=image_features.numpy(),
        text_features=text_features.numpy(),
        logits=logits.numpy(),
    )


def state_dict(model):
    return {name: x.numpy() for name, x in model.state_dict().items()}


def main():
    image, text, mask = inputs()
    arrays = dict(image=image, text=text, text_mask=mask)
    for name, (cfg, custom) in CASES.items():
        model = build(name)
        arrays[f"{name}/cfg"] = np.array(json.dumps({"embed_dim": 8, **cfg, "custom": custom}))
        arrays |= {f"{name}/state/{k}": x for k, x in state_dict(model).items()}
        arrays |= {f"{name}/{k}": x for k, x in outputs(model, image, text).items()}
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    main()
