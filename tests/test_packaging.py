"""The package outside of its repository: data files, help texts, and errors for missing files.

The last tests check that versions agree between the repository's own files.
"""

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
    """Return an empty folder, and an environment whose import path has a copy of the package."""
    site = tmp_path_factory.mktemp("site")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "imgtune_jax", site / "imgtune_jax", ignore=ignored)
    return tmp_path_factory.mktemp("empty"), os.environ | {"PYTHONPATH": str(site)}


def run(installed, code, *arguments):
    """Run Python code in the empty folder, which -P excludes from the import path."""
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
    data_files = {p for p in root.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert data_files == packaged


def test_help_of_every_command_needs_no_repository(installed):
    code = """
import contextlib, io, json, sys
import imgtune_jax
from imgtune_jax.cli import main
help_of = {}
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main([*command.split(), "--help"])
        except SystemExit as exit_error:
            assert exit_error.code == 0, command
    help_of[command] = out.getvalue()
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main(["--help"])
print(json.dumps([imgtune_jax.__file__, out.getvalue(), help_of]))
"""
    completed = run(installed, code, json.dumps(COMMANDS))
    assert completed.returncode == 0, completed.stderr
    package_file, overview, help_of = json.loads(completed.stdout)
    assert not package_file.startswith(str(ROOT))
    for command, help_text in help_of.items():
        assert f"usage: imgtune {command}" in help_text
        assert command.split()[0] in overview


MAIN = "import sys; from imgtune_jax.cli import main; main(sys.argv[1:])"


@pytest.mark.parametrize(
    "command, missing",
    [
        ("train --config=configs/debug.py --workdir=run", "configs/debug.py"),
        ("bench data --config=configs/debug.py", "configs/debug.py"),
        ("info runs/demo", "runs/demo"),
        ("classify --model runs/demo --labels cat --images photos", "photos"),
    ],
)
def test_error_names_the_missing_file_without_traceback(installed, command, missing):
    completed = run(installed, MAIN, *command.split())
    assert completed.returncode != 0
    assert missing in completed.stderr and "Traceback" not in completed.stderr


def test_error_names_the_missing_corpus_without_traceback(installed, tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    config = tmp_path / "configs" / "debug.py"
    completed = run(installed, MAIN, "train", f"--config={config}", "--workdir=run")
    assert completed.returncode != 0
    assert "corpora/emoji" in completed.stderr and "Traceback" not in completed.stderr
    assert not (installed[0] / "run" / "config.json").exists()


def test_linters_have_the_same_version_in_all_files():
    requirements = (ROOT / "requirements.txt").read_text()
    pinned = dict(re.findall(r"^(ruff|pyright)==(.+)$", requirements, re.M))
    dev = PROJECT["project"]["optional-dependencies"]["dev"]
    assert dict(package.split("==") for package in dev if "==" in package) == pinned
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
