"""How much locking helps: the demo's task with the image tower locked, unlocked or from scratch.

python train.py --config=configs/locking_emoji.py:unlocked --workdir=runs/unlocked
python train.py --config=configs/locking_emoji.py:unlocked-full --workdir=runs/unlocked_full

Same data, text tower, steps and schedule for every arm. The short form has pictures at their native
64 pixels and few epochs, so that a run takes minutes on two cores; the full one is the demo's own
task, and takes up to half an hour. All arms and seeds: benchmarks/locking.py.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base, lit_emoji

ARMS = ("locked", "unlocked", "scratch")


def get_config(arm: str = "locked") -> Any:
    """The config of one of ARMS; with `-full` behind it, as long as the demo."""
    arm, _, length = arm.partition("-")
    if arm not in ARMS or length not in ("", "full"):
        raise ValueError(f"arm {arm!r} {length!r}; wanted one of {', '.join(ARMS)}, or ARM-full")
    c = lit_emoji.get_config()
    c.name = f"locking_emoji_{arm}"
    c.baselines = ConfigDict()
    if not length:
        _shorten(c)
    if arm != "locked":
        c.lock.image = False
    if arm == "scratch":
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
