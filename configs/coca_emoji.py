"""CoCa on the emoji corpus: matching and writing from one pass, EfficientNet-Lite0 locked.

python train.py --config=configs/coca_emoji.py:both --workdir=runs/coca_both

Arms: `contrastive` and `captioning` train the same model by one of the two terms alone. English
names; text tower and decoder from scratch on the tower's cached tokens. These are few: no
attentional pooler stands between (configs/coca_l14.py has CoCa's).
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base, caption_emoji, emoji

LENGTH = 18  # in tokens; the longest English name of the corpus has 17
VARIANTS = ("both", "contrastive", "captioning")


def get_config(arm: str = "both") -> Any:
    """The config of one of ARMS."""
    if arm not in VARIANTS:
        raise ValueError(f"arm {arm!r}; wanted one of {', '.join(VARIANTS)}")
    c = caption_emoji.get_config()
    c.name = f"coca_emoji_{arm}"
    c.data.caption_weights, c.data.prefixes = ConfigDict(dict(en=1.0)), ConfigDict()
    c.tokenizer.length, c.data.length_buckets = LENGTH, (12,)
    sizes = dict(width=256, mlp_dim=1024, num_heads=4, max_length=LENGTH, dropout=0.1)
    c.model.text = ConfigDict(
        dict(name="text_transformer", pool="class", depth=1, vocab_size=6000) | sizes
    )
    c.model.image_head = ConfigDict(dict(name="linear", standardize=True))
    c.model.text_head = ConfigDict(dict(name="identity"))
    c.model.embed_dim = 256
    c.model.decoder.update(input_from="text_tower", max_length=LENGTH, chunk=LENGTH)
    c.objectives.softmax = ConfigDict(dict(weight=1.0, positives="group"))
    if arm != "both":
        del c.objectives["captioning" if arm == "contrastive" else "softmax"]
    c.evals = ConfigDict({} if arm == "contrastive" else emoji.caption_evals({"en": ""}))
    if arm != "captioning":
        c.evals.update({k: dict(name="retrieval", source=v, caption_set="name")
                        for k, v in emoji.test_sources().items()})  # fmt: skip
    c.optim.warmup = base.duration(epochs=1)
    c.total = base.duration(epochs=6)
    return c
