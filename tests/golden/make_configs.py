"""Write every config, flattened, into tests/golden/configs/: `python tests/golden/make_configs.py`."""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
import test_config

from imgtune_jax import config

test_config.GOLDEN.mkdir(exist_ok=True)
for path in test_config.CONFIGS:
    flat = config.flatten(config.parse(test_config.load(path)).to_dict())
    (test_config.GOLDEN / f"{path.stem}.json").write_text(json.dumps(flat, indent=1) + "\n")
