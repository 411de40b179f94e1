"""CoCa on the emoji corpus: contrastive and captioning loss, with EfficientNet-Lite0 locked.

python train.py --config=configs/coca_emoji.py:both --workdir=runs/coca_both

Runtime: 3.5 minutes on two CPU cores. Expected on emoji_s: R@1 of 24 % (image → text) and 26 %
(text → image), exact match of 4.5 % (docs/results.md). The variants `contrastive` and `captioning`
train the same model with one of the losses. Captions are English names. Text tower and decoder are
trained from scratch. The decoder attends to 16 cached image tokens; these are so few that CoCa's
attentional pooler (see configs/coca_l14.py) is not needed.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base, caption_emoji, emoji
from imgtune_jax.errors import UserError

LENGTH = 18  # tokens per caption; the longest English name in the corpus has 17
VARIANTS = ("both", "contrastive", "captioning")


def get_config(variant: str = "both") -> Any:
    """Return the config of one of VARIANTS."""
    if variant not in VARIANTS:
        raise UserError(f"variant = {variant!r}; expected one of {', '.join(VARIANTS)}")
    c = caption_emoji.get_config()
    c.name = f"coca_emoji_{variant}"
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
    if variant != "both":
        del c.objectives["captioning" if variant == "contrastive" else "softmax"]
    c.evals = ConfigDict({} if variant == "contrastive" else emoji.caption_evals({"en": ""}))
    if variant != "captioning":
        c.evals.update({k: dict(name="retrieval", source=v, caption_set="name")
                        for k, v in emoji.test_sources().items()})  # fmt: skip
    c.optim.warmup = base.duration(epochs=1)
    c.total = base.duration(epochs=6)
    return c
