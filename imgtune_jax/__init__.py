"""Locked-image tuning and its family, in JAX.

`imgtune_jax.load(folder)` gives a trained model to use. Importing the package itself imports
nothing else: data workers must not load JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imgtune_jax.api import load as load

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from imgtune_jax.api import load

        return load
    raise AttributeError(f"module 'imgtune_jax' has no attribute {name!r}")
