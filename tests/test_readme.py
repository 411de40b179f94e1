"""The pages README.md, CONTRIBUTING.md and docs/: examples run, and named files exist."""

import ast
import inspect
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

import imgtune_jax
from imgtune_jax import cli
from imgtune_jax.config import parse_config
from tests.test_import_levels import LEVEL_OF

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
FOLDERS = r"(?:\.ci|\.github|benchmarks|configs|corpora|docs|imgtune_jax|tests|tests_peers)"
PATH = re.compile(rf"{FOLDERS}/[\w/.-]*|[\w/-]+/\w+\.py")


def python_block(heading):
    """Return the Python block of a section of the README, which must have exactly one."""
    (section,) = [s for s in re.split(r"^## ", README, flags=re.M) if s.startswith(f"{heading}\n")]
    (block,) = PYTHON_BLOCK.findall(section)
    return block


def test_each_python_block_of_the_readme_has_a_test():
    headings = (
        "Use a model",  # test_methods_and_arguments_exist; running it would need trained models
        "Train on your own data",  # test_example_config_is_valid
        "Use a tower in your own JAX code",  # test_porting_example_runs
    )
    assert PYTHON_BLOCK.findall(README) == [python_block(heading) for heading in headings]


def test_methods_and_arguments_exist():
    nodes = ast.walk(ast.parse(python_block("Use a model")))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    assert len(calls) == 6
    for call in calls:
        assert isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name)
        is_model = call.func.value.id in ("model", "captioner")
        owner = imgtune_jax.TunedModel if is_model else imgtune_jax
        parameters = inspect.signature(getattr(owner, call.func.attr)).parameters
        assert {keyword.arg for keyword in call.keywords} <= set(parameters)


def test_example_config_is_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    scope = {}
    exec(python_block("Train on your own data"), scope)
    config = parse_config(scope["get_config"]())
    assert config.data.source["name"] == "folder"
    assert config.objectives["softmax"]["positives"] == "pair"


def test_porting_example_runs():
    scope = {}
    exec(python_block("Use a tower in your own JAX code"), scope)
    assert scope["last_block"].shape == (4, 5, 64)
    assert scope["tangent"].shape == (4, 64)
    assert jnp.isfinite(scope["tangent"]).all() and jnp.any(scope["tangent"] != 0)
    assert scope["loss"].shape == () and jnp.isfinite(scope["loss"])
    assert "kernel" in scope["lite0_params"]["stem"]


def test_commands_and_options_of_the_readme_exist(capsys):
    lines = re.findall(r"^imgtune (.+?)(?:  #.*)?$", README, flags=re.M)
    assert len(lines) == 9
    for line in lines:
        words = line.split()
        try:
            cli.main([*words[: 2 if words[0] == "bench" else 1], "--help"])
        except SystemExit as exit_error:
            assert exit_error.code == 0
        help_text = capsys.readouterr().out
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        assert all(option in help_text for option in options), help_text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    """A link is relative to the page, any other path to the repository or to the package."""
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if not link.startswith("http")]
    missing = [link for link in links if not (page.parent / link).exists()]
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^(?:python|make|\.venv).*$", text, re.M)
    for word in re.split(r"[\s=]", " ".join(code)):
        path = word.partition(":")[0]
        if PATH.fullmatch(path) and "mine" not in path:
            exists = any((folder / path).exists() for folder in (ROOT, ROOT / "imgtune_jax"))
            missing += [] if exists else [path]
    assert not missing


def test_levels_of_the_architecture_page_are_those_of_the_import_test():
    page = (ROOT / "docs" / "architecture.md").read_text()
    listed = re.findall(r"^(\d+) +(\w+)(?:/|\.py)", page, re.M)
    assert {name: int(level) - 1 for level, name in listed} == LEVEL_OF
