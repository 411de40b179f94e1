"""Effect of locking: the demo (lit_emoji) with the image tower locked, unlocked or from scratch.

python train.py --config=configs/locking_emoji.py:unlocked --workdir=runs/unlocked
python train.py --config=configs/locking_emoji.py:unlocked-full --workdir=runs/unlocked_full

All variants have the same data, text tower, steps and schedule. The short form has 3 epochs of
images at their native 64 pixels; the full form (`-full`) has the demo's length and image size.
Runtime on two CPU cores: 2 to 3 minutes for the short form, up to half an hour for the full form.
Expected R@1 on emoji_s, image → text, short form: locked 9.5 %, unlocked 11.5 %, scratch 0.9 %.
docs/results.md has the full form's results. benchmarks/locking.py runs all variants with several
seeds.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base, lit_emoji
from imgtune_jax.errors import UserError

VARIANTS = ("locked", "unlocked", "scratch")


def get_config(variant: str = "locked") -> Any:
    """Return the config of one of VARIANTS; the suffix `-full` selects the full form."""
    tower, _, length = variant.partition("-")
    if tower not in VARIANTS or length not in ("", "full"):
        known = ", ".join(VARIANTS)
        raise UserError(f"variant = {variant!r}; expected one of {known}, or one with -full")
    c = lit_emoji.get_config()
    c.name = f"locking_emoji_{tower}"
    c.baselines = ConfigDict()
    if not length:
        _shorten(c)
    if tower != "locked":
        c.lock.image = False
    if tower == "scratch":
        c.optim.lr_multipliers = (("text/.*", 0.1), (".*", 1.0))
        c.model.image = ConfigDict(dict(name="vit", variant="Ti/16", pool="mean"))
        c.model.image_head = ConfigDict(dict(name="linear"))
        c.weights.image = ConfigDict()
    return c


def _shorten(c: Any) -> None:
    c.model.image_size = 64
    c.preprocess = (dict(name="resize", size=64, mode="squash"),)
    c.data.transforms = (dict(name="random_resized_crop", size=64, scale=(0.7, 1.0)),)
    c.batch_size = 256
    c.total = base.duration(epochs=3)
    c.cache.image_views = 3
