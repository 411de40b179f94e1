"""A tiny model on the emoji corpus, to try training and resuming; `:coca` adds a decoder.

python train.py --config=configs/debug.py --workdir=runs/debug

Runtime: less than a minute on two CPU cores. Expected: the loss falls from 4.2 to about 3.9. If the
run is killed and resumed, its metrics.jsonl is byte-identical to that of an uninterrupted run.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base, emoji


def get_config(variant: str = "") -> Any:
    """Return the debug config; the variant "coca" adds a decoder."""
    c = base.get_config()
    c.name = "debug"
    c.model.image = ConfigDict(dict(name="vit", variant="mu/16", pool="attention", dropout=0.1))
    c.model.text = ConfigDict(
        dict(
            name="text_transformer",
            variant="mu",
            vocab_size=30522,
            max_length=emoji.MAX_TOKENS,
            pool="mean",
        )
    )
    c.model.embed_dim = 32
    c.model.image_size = 64
    c.preprocess = (dict(name="resize", size=64, mode="squash"),)
    emoji.configure(c)
    c.evals = ConfigDict()
    c.data.caption_weights = ConfigDict(dict(name=0.7, keywords=0.3))
    c.data.transforms = (
        dict(name="random_resized_crop", size=64, scale=(0.7, 1.0)),
        dict(name="horizontal_flip"),
    )
    c.batch_size = 64
    c.total = base.duration(steps=30)
    c.optim.ema_decay = 0.9
    c.checkpoint.every = base.duration(steps=5)
    c.log_every = 1
    if variant:
        _add_decoder(c)
    return c


def _add_decoder(c: Any) -> None:
    sizes = dict(width=32, depth=2, mlp_dim=64, num_heads=2, max_length=emoji.MAX_TOKENS)
    c.name = "debug_coca"
    c.model.text.update(pool="class", depth=2)
    c.model.image_pooler = ConfigDict(dict(name="attentional", width=32, num_queries=4))
    c.model.decoder = ConfigDict(
        dict(name="transformer", input_from="text_tower", vocab_size=30522, chunk=4, dropout=0.1)
        | sizes
    )
    c.objectives.captioning = ConfigDict(dict(weight=2.0, label_smoothing=0.1, z_loss=1e-4))
