"""CapPa B/16 (2306.07915): Cap with parallel prediction for 75 % of the captions of each batch.

python train.py --config=configs/cappa_b16.py --workdir=runs/cappa \
    --config.data.source.path='data/{00000..09999}.tar' --config.tokenizer.path=t5_tokenizer

Runtime and scores: not measured; this config needs web data and accelerators. The authors use the
same fraction. All other settings are those of configs/cap_b16.py.
"""

from typing import Any

from configs import cap_b16


def get_config() -> Any:
    """Return the config of CapPa."""
    c = cap_b16.get_config()
    c.name = "cappa_b16"
    c.model.decoder.parallel_fraction = 0.75
    return c
