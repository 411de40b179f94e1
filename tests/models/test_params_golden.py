"""Parameter paths and shapes are fixed: checkpoints, locks and weight maps depend on them."""

import importlib.util
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "golden"


def test_parameter_paths_and_shapes_equal_the_golden_file():
    spec = importlib.util.spec_from_file_location("models_params", FOLDER / "models_params.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert list(script.lines()) == (FOLDER / "models_params.txt").read_text().splitlines()
