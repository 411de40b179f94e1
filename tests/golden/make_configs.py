"""Write every config, flattened, to tests/golden/configs: `python -m tests.golden.make_configs`."""

import json

from imgtune_jax import config
from tests import test_config

if __name__ == "__main__":
    test_config.GOLDEN.mkdir(exist_ok=True)
    for path in test_config.CONFIGS:
        flat = config.flatten_config(config.parse_config(test_config.load(path)).to_dict())
        (test_config.GOLDEN / f"{path.stem}.json").write_text(json.dumps(flat, indent=1) + "\n")
