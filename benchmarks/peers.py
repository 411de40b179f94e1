"""Imports of the codebases to compare with, with workarounds where a plain import fails.

The tests in `tests_peers/` use this module too.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any


def torchvision() -> Any:
    """Import torchvision. Raises ImportError if it is not installed."""
    try:
        import torchvision
    except RuntimeError:  # a CUDA build of torchvision needs two operators that a CPU torch lacks
        from torch import library

        for op in ("nms", "qnms"):
            library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float t) -> Tensor")
        import torchvision
    return torchvision


def open_clip() -> Any:
    """Import open_clip. Raises ImportError if it is not installed."""
    torchvision()
    import open_clip

    return open_clip


def add_big_vision(checkout: Path) -> None:
    """Make `big_vision.models` importable from a checkout, without TensorFlow.

    The modules of big_vision import TensorFlow but do not call it, so empty modules replace
    TensorFlow. Raises ValueError if `checkout` is not a checkout of big_vision.
    """
    if not (checkout / "big_vision" / "models").is_dir():
        raise ValueError(
            f"{checkout} has no folder big_vision/models; expected a checkout of "
            "google-research/big_vision; pass its path"
        )
    # When first imported, this module of Flax looks for a real TensorFlow. So import it before the
    # empty modules replace TensorFlow.
    importlib.import_module("flax.training.checkpoints")
    sys.path.insert(0, str(checkout))
    for name in ("tensorflow", "tensorflow.io", "tensorflow.io.gfile"):
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
    sys.modules["tensorflow"].io = sys.modules["tensorflow.io"]  # pyright: ignore
    sys.modules["tensorflow.io"].gfile = sys.modules["tensorflow.io.gfile"]  # pyright: ignore
