"""CoCa ViT-L/14 from scratch on web data: open_clip's model, trained by the paper's recipe.

python train.py --config=configs/coca_l14.py --workdir=runs/coca \
    --config.data.source.path='data/{00000..09999}.tar' --config.tokenizer.path=clip_bpe.txt.gz

Runtime and scores: not measured; this config needs web data and accelerators.

Sizes are those of open_clip's `coca_ViT-L-14`, so that weights convert in both directions: text
tower and decoder have 12 layers of width 768, and the attentional pooler has 256 queries. Training
follows the paper (Yu et al., 2205.01917, section 4.1 and table 8): captioning weight 2, contrastive
weight 1, batch 65 536, 500 000 steps, 288 pixels, Adafactor with b1 = 0.9, b2 = 0.999, decoupled
weight decay 0.01, 2 % warmup to 8e-4, linear decay. The authors' code is not public. As in Praxis,
b2 is corrected for bias, and weight decay is scaled by the learning rate.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base

LENGTH = 76  # tokens per text


def get_config() -> Any:
    """Return the config of CoCa."""
    c = base.get_config()
    c.name = "coca_l14"
    c.mesh.fsdp = 8
    common = dict(norm_epsilon=1e-5, act="gelu")
    c.model.image = ConfigDict(
        dict(name="vit", variant="L/14", pre_norm=True, patch_bias=False, final_norm="none")
        | common
    )
    c.model.image_pooler = ConfigDict(
        dict(name="attentional", layout="shared", width=768, num_queries=256, norm_epsilon=1e-5)
    )
    sizes = dict(width=768, depth=12, mlp_dim=3072, num_heads=12, max_length=LENGTH)
    c.model.text = ConfigDict(dict(name="text_transformer", pool="class") | sizes | common)
    c.model.decoder = ConfigDict(
        dict(name="transformer", input_from="text_tower", cross="block", vocab_size=49408)
        | sizes
        | common
    )
    for component in (c.model.image, c.model.text, c.model.decoder):
        component.update(scan=True, remat=True)
    c.model.image_size = 280  # a multiple of patch size 14; the paper has 288 and patch size 18
    c.model.dtype = "bfloat16"
    c.preprocess = (ConfigDict(dict(name="resize", size=c.model.image_size, mode="squash")),)
    c.tokenizer.length = LENGTH
    c.objectives = ConfigDict(dict(softmax=dict(weight=1.0), captioning=dict(weight=2.0)))
    c.batch_size = 65_536
    c.total = base.duration(steps=500_000)
    c.optim.name, c.optim.args = "adafactor", ConfigDict(dict(b1=0.9, b2=0.999))
    c.optim.lr = 8e-4
    c.optim.schedule = "linear"
    c.optim.warmup, c.optim.warmup_from_zero = base.duration(steps=10_000), True
    c.optim.weight_decay = 0.01
    return c
