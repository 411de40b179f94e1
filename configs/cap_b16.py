"""Cap B/16 (Tschannen et al., 2306.07915): pretrain a ViT by captioning web images.

python train.py --config=configs/cap_b16.py --workdir=runs/cap \
    --config.data.source.path='data/{00000..09999}.tar' --config.tokenizer.path=t5_tokenizer

Runtime and scores: not measured; this config needs web data and accelerators.

The settings are those of the authors (big_vision, configs/proj/cappa/pretrain.py). Model: ViT-B/16
at 224 pixels without a class token; a decoder of 6 layers as wide as the encoder, without biases in
its layers; a begin token, which is T5's padding token, and 64 tokens; a vocabulary of 32 000, here
32 100 with the sentinels of T5's tokenizer. Training: batch 8192 for 366 500 steps, Adafactor with
a second-moment decay of at most 0.999, learning rate 1e-3 with 10 000 warmup steps and cosine
decay, weight decay 1e-4 times the schedule, gradients clipped at norm 1, no dropout, no label
smoothing. Differences: initial values; Adafactor factors the second moment of an attention kernel
as [width width], the authors' as [width heads width/heads].
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base

LENGTH = 65  # tokens per caption: the begin token and the authors' 64


def get_config() -> Any:
    """Return the config of Cap."""
    c = base.get_config()
    c.name = "cap_b16"
    c.model.image = ConfigDict(dict(name="vit", variant="B/16", class_token=False, pool="mean"))
    for component in ("text", "text_head", "image_head", "embed_dim"):
        del c.model[component]
    c.model.decoder = ConfigDict(
        dict(name="transformer", variant="B", depth=6, vocab_size=32_100, max_length=LENGTH)
        | dict(act="gelu_tanh", use_bias=False, vocab_bias=True)
    )
    c.model.dtype = "bfloat16"
    c.tokenizer.update(length=LENGTH, begin_token="<pad>")  # T5 adds no begin token
    c.objectives = ConfigDict(dict(captioning=dict(weight=1.0)))
    c.batch_size = 8192
    c.total = base.duration(steps=366_500)
    c.optim.name, c.optim.args = "adafactor", ConfigDict(dict(beta2_cap=0.999))
    c.optim.warmup, c.optim.warmup_from_zero = base.duration(steps=10_000), True
    c.optim.weight_decay, c.optim.weight_decay_scaled_by = 1e-4, "schedule"
    return c
