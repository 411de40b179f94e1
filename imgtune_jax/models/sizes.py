"""Sizes of transformers by the names that papers use, such as "B"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imgtune_jax.errors import UserError


def _size(width: int, depth: int, mlp_dim: int, num_heads: int) -> dict[str, int]:
    return dict(width=width, depth=depth, mlp_dim=mlp_dim, num_heads=num_heads)


# From ViT (2010.11929), scaled ViT (2106.04560) and SoViT (2305.13035), as in big_vision.
SIZES: dict[str, dict[str, int]] = {
    "mu": _size(32, 1, 128, 2),  # for tests
    "Ti": _size(192, 12, 768, 3),
    "S": _size(384, 12, 1536, 6),
    "B": _size(768, 12, 3072, 12),
    "L": _size(1024, 24, 4096, 16),
    "So400m": _size(1152, 27, 4304, 16),
    "H": _size(1280, 32, 5120, 16),
    "g": _size(1408, 40, 6144, 16),
    "G": _size(1664, 48, 8192, 16),
}


def get_variant(
    table: Mapping[str, Mapping[str, Any]], variant: str, component: str
) -> dict[str, Any]:
    """Return the fields of `variant`. Raises a UserError that lists the variants of the table."""
    if variant not in table:
        raise UserError(
            f"{component} has no variant {variant!r}; expected one of {', '.join(table)}"
        )
    return dict(table[variant])


def decode_vit_variant(variant: str) -> dict[str, int]:
    """Return the fields of a ViT variant: "B/16" is size B with patches of 16 pixels."""
    size, slash, patch = variant.partition("/")
    if not slash or not patch.isdigit():
        raise UserError(
            f"vit variant = {variant!r}; expected SIZE/PATCH with the patch in pixels, like 'B/16'"
        )
    return {**get_variant(SIZES, size, "vit"), "patch_size": int(patch)}
