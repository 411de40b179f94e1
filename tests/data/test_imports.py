"""Importing `imgtune_jax.data` loads no framework, and works without JAX."""

import subprocess
import sys

CHECK_LOADED_MODULES = """
import sys
from imgtune_jax import data
from imgtune_jax.data import pipeline
loaded = set(sys.modules)
assert not loaded & {"flax", "tensorflow", "torch", "transformers", "tensorflow_datasets"}, loaded
# Grain imports jax.tree_util if JAX is installed. That must not initialize a device.
if "jax" in loaded:
    from jax._src import xla_bridge
    assert not xla_bridge._backends, "a backend was initialized"
"""

LOAD_A_BATCH_WITHOUT_JAX = """
import sys
sys.modules["jax"] = None  # as if it were not installed
sys.modules["flax"] = None
import itertools
from imgtune_jax import data
source = data.build_source({"name": "webdataset", "path": sys.argv[1]})
resize = data.build_transform([{"name": "resize", "size": 8}])
pipeline = data.Pipeline(source=source, transform=resize, batch_size=4, shuffle=True)
(batch,) = itertools.islice(pipeline.batches(3), 1)
assert batch["image"].shape == (4, 8, 8, 3)
"""


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_importing_data_initializes_no_device_and_loads_no_framework():
    result = run(CHECK_LOADED_MODULES)
    assert result.returncode == 0, result.stderr


def test_data_works_without_jax(source):
    result = run(LOAD_A_BATCH_WITHOUT_JAX, source.path)
    assert result.returncode == 0, result.stderr
