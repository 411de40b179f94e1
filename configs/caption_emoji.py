"""Emoji captions in ten languages: a small decoder on a locked EfficientNet-Lite0.

python train.py --config=configs/caption_emoji.py --workdir=runs/captions

Runtime: 20 minutes on two CPU cores. Expected on emoji_s: exact match of 29 to 31 % for English,
less for other languages (docs/results.md). The decoder attends to the 16 tokens of the tower's last
feature map. A caption's first token selects its language; half of the sampled captions are English.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base, emoji, lit_emoji

LENGTH = 28  # tokens per caption, with its prefix; the longest name in the corpus has 26


def get_config() -> Any:
    """Return the captioner's config."""
    c = lit_emoji.get_config()
    c.name = "caption_emoji"
    c.data.source = emoji.captions_source("seen", "google", "twitter")
    c.data.caption_weights = ConfigDict({k: 9.0 if k == "en" else 1.0 for k in emoji.LANGUAGES})
    c.data.prefixes = ConfigDict(emoji.PREFIXES)
    c.data.length_buckets = (12, 16, 20)  # names have 8 tokens on average
    c.tokenizer = ConfigDict(dict(path="corpora/emoji/tokenizer", length=LENGTH))
    c.evals, c.baselines = ConfigDict(emoji.caption_evals(emoji.PREFIXES)), ConfigDict()

    # The tower runs in float32: on a CPU, bfloat16 convolutions are three times slower.
    c.model.image = ConfigDict(dict(name="efficientnet_lite", variant="lite0", dtype="float32"))
    for component in ("text", "text_head", "image_head", "embed_dim"):
        del c.model[component]
    c.model.dtype = "bfloat16"
    c.model.decoder = ConfigDict(
        dict(
            name="transformer",
            width=256,
            depth=2,
            mlp_dim=1024,
            num_heads=4,
            vocab_size=6000,
            max_length=LENGTH,
            chunk=LENGTH,
            context_norm=True,
            dropout=0.1,
        )
    )
    c.weights.text = ConfigDict()
    c.lock.update(text=False, text_unlocked_layers=0)
    c.cache.update(image_views=4, text_views=0)

    c.objectives = ConfigDict(dict(captioning=dict(weight=1.0, label_smoothing=0.1)))
    c.batch_size = 64  # from scratch, many small steps learn faster than few large ones
    c.total = base.duration(epochs=40)
    c.optim.update(lr=3e-3, weight_decay=0.01)
    c.optim.warmup = base.duration(epochs=3)
    c.optim.lr_multipliers = ((".*", 1.0),)
    c.log_every, c.checkpoint.every = 20, base.duration(steps=500)
    return c
