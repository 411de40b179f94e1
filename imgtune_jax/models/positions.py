"""Position embeddings of image patches, row-major over a square grid."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def sincos_2d(grid: int, width: int, *, temperature: float = 10_000.0) -> Float[np.ndarray, "l d"]:
    """Fixed sine-cosine positions of MoCo v3 (2104.02057) as in big_vision.

    Raises ValueError unless the width divides by 4.
    """
    if width % 4:
        raise ValueError(f"sincos positions need a width that divides by 4, got {width}")
    y, x = np.mgrid[:grid, :grid]
    omega = 1.0 / temperature ** (np.arange(width // 4) / (width // 4 - 1))
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], 1).astype(np.float32)


def resize_pos_embed(
    positions: Float[Array, "l d"] | Float[np.ndarray, "l d"], length: int
) -> Float[Array, "m d"]:
    """A learned grid at another resolution: antialiased bicubic, as open_clip does on loading.

    Raises ValueError if either length is not a square.
    """
    old, new = math.isqrt(positions.shape[0]), math.isqrt(length)
    if old * old != positions.shape[0] or new * new != length:
        raise ValueError(
            f"positions: cannot resize a grid of {positions.shape[0]} to {length}; both must be "
            "squares"
        )
    if old == new:
        return jnp.asarray(positions)
    grid = jnp.asarray(positions).reshape(old, old, -1)
    grid = jax.image.resize(grid, (new, new, grid.shape[-1]), "cubic", antialias=True)
    return grid.reshape(length, -1)
