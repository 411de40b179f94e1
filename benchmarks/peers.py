"""The peers' libraries, importable where their own imports would fail. Tests of them use it too."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any


def torchvision() -> Any:
    """The torchvision module. Raises ImportError where it is not installed."""
    try:
        import torchvision
    except RuntimeError:  # built for CUDA, beside a CPU torch it looks for two operators in vain
        from torch import library

        for op in ("nms", "qnms"):
            library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float t) -> Tensor")
        import torchvision
    return torchvision


def open_clip() -> Any:
    """The open_clip module. Raises ImportError where it is not installed."""
    torchvision()
    import open_clip

    return open_clip


def add_big_vision(checkout: Path) -> None:
    """Make `big_vision.models` importable from a checkout. Its TensorFlow is never called."""
    if not (checkout / "big_vision" / "models").is_dir():
        raise ValueError(f"{checkout} is no checkout of big_vision: no big_vision/models in it")
    # Flax looks for a real TensorFlow when this is first imported: before ours stands in for it.
    importlib.import_module("flax.training.checkpoints")
    sys.path.insert(0, str(checkout))
    for name in ("tensorflow", "tensorflow.io", "tensorflow.io.gfile"):
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
    sys.modules["tensorflow"].io = sys.modules["tensorflow.io"]  # pyright: ignore
    sys.modules["tensorflow.io"].gfile = sys.modules["tensorflow.io.gfile"]  # pyright: ignore
