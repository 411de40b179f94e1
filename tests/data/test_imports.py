"""What importing the room, and running a worker of it, pulls in."""

import subprocess
import sys

CODE = """
import sys
from imgtune_jax import data
from imgtune_jax.data import pipeline
loaded = set(sys.modules)
assert not loaded & {"flax", "tensorflow", "torch", "transformers", "tensorflow_datasets"}, loaded
# Grain itself imports jax.tree_util where JAX is installed; no device may be claimed by that.
if "jax" in loaded:
    from jax._src import xla_bridge
    assert not xla_bridge._backends, "a backend was started"
"""

WITHOUT_JAX = """
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


def test_importing_the_room_claims_no_device_and_loads_no_framework():
    done = run(CODE)
    assert done.returncode == 0, done.stderr


def test_the_room_works_where_jax_is_not_installed(source):
    done = run(WITHOUT_JAX, source.path)
    assert done.returncode == 0, done.stderr
