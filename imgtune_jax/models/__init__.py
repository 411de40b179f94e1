"""Towers, heads and the models made of them. The only room that imports flax.linen."""

from imgtune_jax.models.build import HEADS, TOWERS, ModelFields, abstract_tower, build, build_tower
from imgtune_jax.models.pooling import TowerOutput
from imgtune_jax.models.stack import TAIL
from imgtune_jax.models.two_tower import TwoTower, param_paths, unit_norm

Model = TwoTower  # the one kind so far; what the other rooms call it

__all__ = [
    "HEADS",
    "TAIL",
    "TOWERS",
    "Model",
    "ModelFields",
    "TowerOutput",
    "TwoTower",
    "abstract_tower",
    "build",
    "build_tower",
    "param_paths",
    "unit_norm",
]
