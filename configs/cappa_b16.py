"""CapPa B/16 (2306.07915): Cap, where three quarters of each batch are predicted in parallel.

python train.py --config=configs/cappa_b16.py --workdir=runs/cappa \
    --config.data.source.path='data/{00000..09999}.tar' --config.tokenizer.path=t5_tokenizer

75 % is the authors' share; all else is Cap's.
"""

from typing import Any

from configs import cap_b16


def get_config() -> Any:
    """The config of CapPa."""
    c = cap_b16.get_config()
    c.name = "cappa_b16"
    c.model.decoder.parallel_fraction = 0.75
    return c
