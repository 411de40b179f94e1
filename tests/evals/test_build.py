from __future__ import annotations

import dataclasses
import inspect
import pkgutil

import jax
import pytest

from imgtune_jax import data, evals


def test_table_has_every_evaluator():
    evaluators = set()
    for module in pkgutil.iter_modules(evals.__path__, "imgtune_jax.evals."):
        members = inspect.getmembers(__import__(module.name, fromlist=["x"]), inspect.isclass)
        evaluators |= {
            c
            for _, c in members
            if c.__module__ == module.name and isinstance(getattr(c, "task", None), str)
        }
    assert evaluators == set(evals.EVALUATORS.values())
    for kind in evaluators:
        assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen


def test_config_builds_sources_objectives_tuples_and_mesh(monkeypatch):
    monkeypatch.setattr(data, "build_source", lambda cfg: ("built", cfg["name"]), raising=False)
    mesh = jax.make_mesh((8,), ("data",))
    got = evals.build_evaluators(
        {
            "a": {"name": "retrieval", "source": {"name": "folder"}, "ks": [1, 3]},
            "b": {
                "name": "loss",
                "source": {"name": "tfds"},
                "objective": {"sigmoid": {"weight": 2.0}},
            },
            "c": {"name": "fewshot", "source": {"name": "x"}, "train_source": {"name": "y"},
                  "num_classes": 3},
        },
        mesh=mesh,
    )  # fmt: skip
    assert got["a"].source == ("built", "folder") and got["a"].ks == (1, 3)
    assert got["a"].mesh is mesh
    assert got["b"].objective.terms[0][0] == 2.0
    assert got["c"].train_source == ("built", "y")


def test_error_lists_all_invalid_names_and_fields():
    with pytest.raises(ValueError) as error:
        evals.build_evaluators(
            {
                "a": {"name": "retreival"},
                "b": {"name": "retrieval", "source": {}, "k": 3},
                "c": {"name": "linear_probe", "source": {}},
            }
        )
    for part in (
        "a.name = 'retreival' is unknown",
        "b.k is unknown",
        "c.num_classes is missing",
        "c.train_source is missing",
    ):
        assert part in str(error.value)
