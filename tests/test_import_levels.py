"""The rules for imports, file names and function names, checked in the source."""

import ast
import collections
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "imgtune_jax"

# Levels, lowest first. A package or module imports from lower levels and from itself only.
LEVELS = (
    {"types", "errors", "paths", "config_history", "config_values"},
    {"config", "disk_space", "distributed", "json_lines", "param_tree", "package_files", "xla_cpu"},
    {"partition", "locking"},
    {"models", "objectives", "data", "decoding"},
    {"evals", "interop"},
    {"training"},
    {"bench", "report", "info"},
    {"api"},
    {"cli"},
    {"__main__"},
)
LEVEL_OF = {package: level for level, packages in enumerate(LEVELS) for package in packages}


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def package_of(path):
    """Return the name of a file in LEVELS: that of its sub-package, or else its own."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Yield the dotted names of all imports in a file, including those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "imgtune_jax":
                yield from (f"imgtune_jax.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_are_from_lower_levels(path):
    package = package_of(path)
    assert package in LEVEL_OF, f"{package} is new; add it to LEVELS and to docs/architecture.md"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "imgtune_jax" or len(parts) == 1 or parts[1] == package:
            continue
        is_lower = LEVEL_OF.get(parts[1], -1) < LEVEL_OF[package]
        assert is_lower, (
            f"{path.relative_to(ROOT)} ({package}) imports {name}: not on a lower level"
        )


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_models_imports_linen_and_no_file_imports_torch_or_tensorflow(path):
    names = set(imported(path))
    assert not any(name.split(".")[0] in ("torch", "tensorflow") for name in names)
    if package_of(path) != "models":
        assert "flax.linen" not in names


def test_data_imports_neither_jax_nor_flax():
    for path in (PACKAGE / "data").rglob("*.py"):
        assert not {t.split(".")[0] for t in imported(path)} & {"jax", "flax"}, path


def test_importing_the_package_imports_no_jax():
    code = "import sys, imgtune_jax; print('jax' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.stdout == "False\n", process.stderr


def test_file_names_are_unique():
    counts = collections.Counter(path.name for path in modules() if path.name != "__init__.py")
    assert not [name for name, count in counts.items() if count > 1]


# Function names that do not state what is built or loaded. Only `imgtune_jax.load`, which users
# call, may have one.
VAGUE_NAMES = {"build", "load", "save", "run", "describe", "draw"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_public_functions_are_named_after_their_object(path):
    functions = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}
    allowed = {"load"} if path == PACKAGE / "api.py" else set()
    assert not functions & VAGUE_NAMES - allowed


@pytest.mark.parametrize("package", ["objectives", "evals", "data", "models", "decoding"])
def test_every_component_is_in_the_table_of_its_package(package):
    """A file that is not in HELPERS defines a component that is in a table of its package."""
    import imgtune_jax.data
    import imgtune_jax.decoding
    import imgtune_jax.evals
    import imgtune_jax.objectives
    from imgtune_jax import models

    tables = {
        "objectives": [imgtune_jax.objectives.OBJECTIVES],
        "evals": [imgtune_jax.evals.EVALUATORS],
        "data": [imgtune_jax.data.SOURCES, imgtune_jax.data.TRANSFORMS],
        "models": [models.TOWERS, models.HEADS, models.DECODERS, models.POOLERS],
        "decoding": [imgtune_jax.decoding.METHODS],
    }
    files = {
        Path(sys.modules[v.__module__].__file__).name for t in tables[package] for v in t.values()
    }
    others = {p.name for p in (PACKAGE / package).glob("*.py")} - files
    helpers = HELPERS[package]
    assert others <= helpers, (
        f"{sorted(others - helpers)}: in no table of {package}, nor in HELPERS"
    )
    assert helpers <= others, f"{sorted(helpers - others)}: in HELPERS, but absent or in a table"


# Files that define no component; several components share their code.
HELPERS: dict[str, set[str]] = {
    "objectives": {"__init__.py", "contrastive.py", "pairs.py"},
    "evals": {
        "__init__.py",
        "checks.py",
        "metric_direction.py",
        "normalize.py",
        "per_class.py",
        "predictor.py",
        "protocol.py",
        "ranks.py",
        "results.py",
        "ridge.py",
        "run_evaluator.py",
        "templates.py",
        "captioner.py",
    },
    "data": {
        "__init__.py",
        "caption_sampler.py",
        "clip_bpe.py",
        "record_fields.py",
        "image.py",
        "image_list.py",
        "pipeline.py",
        "record.py",
        "resample.py",
        "rows.py",
        "sources.py",
        "subset.py",
        "feature_store.py",
        "hidden.py",
        "table.py",
        "fingerprint.py",
        "segments.py",
        "tar_index.py",
        "tokenizer.py",
        "tokenizer_files.py",
        "train_tokenizer.py",
    },
    "decoding": {
        "__init__.py",
        "scoring.py",
        "beam_search.py",
        "generate.py",
        "logits_processors.py",
        "sampling.py",
        "prefill.py",
        "top_k.py",
    },
    "models": {
        "__init__.py",
        "attention.py",
        "block.py",
        "build.py",
        "conv.py",
        "gradients.py",
        "image_text.py",
        "initializers.py",
        "layers.py",
        "components.py",
        "positions.py",
        "sizes.py",
        "layer_stack.py",
        "transformer.py",
        "token_scores.py",
    },
}


def test_texts_and_json_are_split_at_line_feeds_only():
    """`splitlines` also splits at U+2028 and other characters that captions and JSON may have."""
    users = {path.name for path in modules() if "splitlines" in path.read_text("utf-8")}
    assert users == {"java.py"}  # which replaces these characters
