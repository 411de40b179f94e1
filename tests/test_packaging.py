"""The package without its repository: data files, help texts, and what a command lacks there."""

import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMMANDS = (
    "train",
    "cache",
    "bench data",
    "eval",
    "embed",
    "search",
    "classify",
    "caption",
    "info",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An empty folder, and an environment whose import path has a copy of the package alone."""
    site = tmp_path_factory.mktemp("site")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "imgtune_jax", site / "imgtune_jax", ignore=ignored)
    return tmp_path_factory.mktemp("empty"), os.environ | {"PYTHONPATH": str(site)}


def run(installed, code, *arguments):
    """Run Python code in the empty folder. -P keeps that folder off the import path."""
    folder, environment = installed
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )


def test_every_data_file_is_in_the_wheel():
    package = importlib.resources.files("imgtune_jax")
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["imgtune_jax"]
    root = Path(str(package))
    packaged = {path for pattern in patterns for path in root.glob(pattern)}
    assert all(any(root.glob(pattern)) for pattern in patterns)
    names = {path.relative_to(root).as_posix() for path in packaged}
    assert {"report/report.html", "evals/imagenet_classnames.txt", "evals/LICENSE.prompts"} <= names
    others = {p for p in root.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert others == packaged


def test_help_of_every_command_needs_no_repository(installed):
    code = """
import contextlib, io, json, sys
import imgtune_jax
from imgtune_jax.cli import main
shown = {"": imgtune_jax.__file__}
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main([*command.split(), "--help"])
        except SystemExit as done:
            assert done.code == 0, command
    shown[command] = out.getvalue()
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main(["--help"])
shown["--help"] = out.getvalue()
print(json.dumps(shown))
"""
    done = run(installed, code, json.dumps(COMMANDS))
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert not shown.pop("").startswith(str(ROOT))
    overview = shown.pop("--help")
    for command, text in shown.items():
        assert f"usage: imgtune {command}" in text
        assert command.split()[0] in overview


MAIN = "import sys; from imgtune_jax.cli import main; main(sys.argv[1:])"


@pytest.mark.parametrize(
    "command, lacking",
    [
        ("train --config=configs/debug.py --workdir=run", "configs/debug.py"),
        ("bench data --config=configs/debug.py", "configs/debug.py"),
        ("info runs/demo", "runs/demo"),
        ("classify --model runs/demo --labels cat --images photos", "photos"),
    ],
)
def test_a_command_names_the_file_that_it_lacks(installed, command, lacking):
    done = run(installed, MAIN, *command.split())
    assert done.returncode != 0
    assert lacking in done.stderr and "Traceback" not in done.stderr


def test_a_command_without_the_corpus_names_it(installed, tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    config = tmp_path / "configs" / "debug.py"
    done = run(installed, MAIN, "train", f"--config={config}", "--workdir=run")
    assert done.returncode != 0
    assert "corpora/emoji" in done.stderr and "Traceback" not in done.stderr
    assert not (installed[0] / "run" / "config.json").exists()


def test_linters_have_one_version():
    pinned = dict(
        re.findall(r"^(ruff|pyright)==(.+)$", (ROOT / "requirements.txt").read_text(), re.M)
    )
    dev = dict(
        d.split("==") for d in PROJECT["project"]["optional-dependencies"]["dev"] if "==" in d
    )
    assert dev == pinned
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = [repo for repo in hooks if "ruff" in repo["repo"]]
    assert ruff["rev"] == f"v{pinned['ruff']}"


def test_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = PROJECT["project"]
    assert citation["cff-version"] == "1.2.0"
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    import imgtune_jax

    assert imgtune_jax.__version__ == project["version"]


def test_workflow_covers_the_supported_pythons():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    versions = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert versions == ["3.11", "3.12", "3.13"]
    assert PROJECT["project"]["requires-python"] == f">={versions[0]}"
