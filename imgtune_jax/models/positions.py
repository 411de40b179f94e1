"""Position embeddings of image patches, in row-major order over a square grid.

Axis letters: m positions after resizing.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from imgtune_jax.errors import UserError


def sincos_2d(grid: int, width: int, *, temperature: float = 10_000.0) -> Float[np.ndarray, "l d"]:
    """Return the fixed sine-cosine position embeddings of MoCo v3 (2104.02057), as in big_vision.

    Raises UserError unless the width is a multiple of 4.
    """
    if width % 4:
        raise UserError(f"width = {width}; sine-cosine positions need a multiple of 4")
    y, x = np.mgrid[:grid, :grid]
    omega = 1.0 / temperature ** (np.arange(width // 4) / (width // 4 - 1))
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], 1).astype(np.float32)


def resize_pos_embed(
    positions: Float[Array, "l d"] | Float[np.ndarray, "l d"], length: int
) -> Float[Array, "m d"]:
    """Resize the learned positions of a square grid to `length` positions.

    The interpolation is antialiased and bicubic, as when open_clip loads weights.

    Raises UserError if either length is not the square of an integer.
    """
    old, new = math.isqrt(positions.shape[0]), math.isqrt(length)
    if old * old != positions.shape[0] or new * new != length:
        raise UserError(
            f"cannot resize {positions.shape[0]} positions to {length}; both must be squares of "
            "integers"
        )
    if old == new:
        return jnp.asarray(positions)
    grid = jnp.asarray(positions).reshape(old, old, -1)
    grid = jax.image.resize(grid, (new, new, grid.shape[-1]), "cubic", antialias=True)
    return grid.reshape(length, -1)
