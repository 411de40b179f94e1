"""The names that `imgtune_jax` exports lazily."""

import ast
from pathlib import Path

import pytest

import imgtune_jax
from imgtune_jax import interop


@pytest.mark.parametrize("name", imgtune_jax.__all__)
def test_public_name_is_importable(name):
    assert getattr(imgtune_jax, name).__name__ == name
    assert name in dir(imgtune_jax)


def test_type_checkers_see_the_public_names():
    tree = ast.parse(Path(imgtune_jax.__file__).read_text())
    (type_checking,) = (node for node in tree.body if isinstance(node, ast.If))
    names = [alias.name for statement in type_checking.body for alias in statement.names]
    assert sorted(names) == sorted(imgtune_jax.__all__)


def test_every_converter_is_public():
    assert set(interop.__all__) - {"LOADERS"} <= set(imgtune_jax.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = imgtune_jax.lod
