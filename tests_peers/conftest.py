"""Live comparisons with PyTorch peers, in an environment of their own (see the Makefile)."""

import importlib.util
import sys
from pathlib import Path

import jax
import pytest
import torch

jax.config.update("jax_platforms", "cpu")
torch.manual_seed(0)

# torchvision's CUDA build lacks these on a CPU torch, and fails at import without them.
for op in ("nms", "qnms"):
    torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float t) -> Tensor")


def _load(name):
    """A script of tests/golden as a module: goldens and live tests run the same cases."""
    path = Path(__file__).parents[1] / "tests" / "golden" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load_golden_script():
    return _load
