"""All config keys with their defaults: a SigLIP-style ViT-B/16, trained from scratch.

python train.py --config=configs/base.py --workdir=runs/base \
    --config.data.source.path='data/{00000..09999}.tar' --config.tokenizer.path=clip_bpe.txt.gz

Runtime and scores: not measured; this config needs web data and accelerators. The other configs
start from this one and set only what differs.

The dataclasses of `imgtune_jax/config.py` document and check the keys. The keys of a component are
the fields of its class: towers in `imgtune_jax/models/`, sources in `imgtune_jax/data/`, ….
"""

import math
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


class Settings(ConfigDict):
    """A ConfigDict whose attribute `lock` is the key `lock`, not the method `ConfigDict.lock`.

    Command-line flags such as `--config.lock.image=True` need this.
    """

    @property
    def lock(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The settings that select parameters that do not train."""
        return self["lock"]


def duration(steps=None, epochs=None, examples=None) -> Any:
    """Return a duration in steps, epochs or examples; all None means never."""
    d: Any = ConfigDict()
    d.steps = placeholder(int) if steps is None else steps
    d.epochs = placeholder(float) if epochs is None else float(epochs)
    d.examples = placeholder(int) if examples is None else examples
    return d


def get_config() -> Any:
    """Return the base config."""
    c: Any = Settings()
    c.name = "base"
    c.seed = 0
    c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))

    c.model = ConfigDict()
    c.model.image = ConfigDict(dict(name="vit", variant="B/16", pool="attention"))
    c.model.text = ConfigDict(dict(name="text_transformer", variant="B", pool="last"))
    c.model.image_head = ConfigDict(dict(name="linear"))
    c.model.text_head = ConfigDict(dict(name="linear"))
    c.model.embed_dim = 768
    c.model.logit_scale_init = math.log(10.0)
    c.model.logit_scale_max = math.log(100.0)
    c.model.logit_bias_init = placeholder(float)
    c.model.dtype = "float32"
    c.model.image_size = 224
    c.model.image_mean = (127.5, 127.5, 127.5)  # in units of 0 to 255
    c.model.image_std = (127.5, 127.5, 127.5)
    c.weights = ConfigDict(dict(image={}, text={}))  # {}: random initialization

    c["lock"] = ConfigDict(
        dict(
            image=False,
            image_head=False,
            image_unlocked_layers=0,
            text=False,
            text_head=False,
            text_unlocked_layers=0,
            logit_scale=False,
            patterns=(),
        )
    )

    c.objectives = ConfigDict(dict(softmax=dict(weight=1.0)))

    c.tokenizer = ConfigDict(dict(path="", length=64))
    c.preprocess = (ConfigDict(dict(name="resize", size=224, mode="squash")),)
    c.data = ConfigDict()
    c.data.source = ConfigDict(dict(name="webdataset", path=""))
    c.data.caption_weights = ConfigDict(dict(caption=1.0))
    c.data.prefixes = ConfigDict()
    c.data.length_buckets = ()  # lengths to pad batches of short texts to, below tokenizer.length
    c.data.transforms = ()  # (): training images are transformed by `preprocess` only
    c.data.num_threads = 4
    c.data.num_workers = 0
    c.data.prefetch = 4
    c.data.max_bad_fraction = 0.1
    c.data.max_bad_fraction_after = 1000
    c.cache = ConfigDict(dict(path=placeholder(str), dtype="bfloat16", image_views=1, text_views=0))

    c.batch_size = 256
    c.accumulation = 1
    c.total = duration(epochs=1)

    c.optim = ConfigDict()
    c.optim.name = "adamw"
    c.optim.args = ConfigDict(dict(b1=0.9, b2=0.95))
    c.optim.lr = 1e-3
    c.optim.schedule = "cosine"
    c.optim.warmup = duration(steps=0)
    c.optim.warmup_from_zero = False
    c.optim.cooldown = duration(steps=0)
    c.optim.timescale = duration()
    c.optim.weight_decay = 0.1  # SigLIP: 1e-4 per step, without the factor lr
    c.optim.weight_decay_scaled_by = "learning_rate"  # or "schedule", as in big_vision
    c.optim.clip_norm = 1.0
    c.optim.layer_decay = 1.0
    c.optim.lr_multipliers = ((".*", 1.0),)
    c.optim.weight_decay_multipliers = ((".*/kernel", 1.0), (".*", 0.0))
    c.optim.ema_decay = placeholder(float)

    c.checkpoint = ConfigDict()
    c.checkpoint.every = duration(steps=1000)
    c.checkpoint.keep_last = 2
    c.checkpoint.keep_best = 1
    c.checkpoint.best_metric = placeholder(str)
    c.checkpoint.best_mode = placeholder(str)  # "max" or "min"; None: by the name of the metric
    c.eval_every = duration()
    c.evals = ConfigDict()
    c.baselines = ConfigDict()
    c.log_every = 50
    c.wandb_project = placeholder(str)
    return c
