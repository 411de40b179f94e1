"""The import rules of the house, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "imgtune_jax"

# Rooms, lowest first; a room may import from lower floors and from itself only.
LEVELS = (
    {"types", "errors", "config_history"},
    {"config", "param_tree", "package_files", "xla_cpu"},
    {"partition", "locking"},
    {"models", "objectives", "data", "decoding"},
    {"evals", "interop"},
    {"training"},
    {"bench"},
    {"report", "info"},
    {"api"},
    {"cli"},
)
LEVEL_OF = {room: height for height, floor in enumerate(LEVELS) for room in floor}


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def package_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Dotted names of all imports of a file, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "imgtune_jax":
                yield from (f"imgtune_jax.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    here = package_of(path)
    assert here in LEVEL_OF, (
        f"{here} is a new room: give it a floor here and in docs/architecture.md"
    )
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "imgtune_jax" or len(parts) == 1 or parts[1] == here:
            continue
        below = LEVEL_OF.get(parts[1], -1) < LEVEL_OF[here]
        assert below, f"{path.relative_to(ROOT)} ({here}) imports {name}: not on a lower floor"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_linen_stays_in_models_and_torch_and_tensorflow_outside(path):
    tops = set(imported(path))
    assert not any(t.split(".")[0] in ("torch", "tensorflow") for t in tops)
    if package_of(path) != "models":
        assert "flax.linen" not in tops


def test_data_room_imports_neither_jax_nor_flax():
    for path in (PACKAGE / "data").rglob("*.py"):
        assert not {t.split(".")[0] for t in imported(path)} & {"jax", "flax"}, path


def test_importing_the_package_imports_no_jax():
    code = "import sys, imgtune_jax; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("room", ["objectives", "evals", "data", "models", "decoding"])
def test_every_component_is_in_its_rooms_table(room):
    """A dataclass or module with `__call__` that a config could name must be reachable by name."""
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
        Path(sys.modules[v.__module__].__file__).name for t in tables[room] for v in t.values()
    }
    named = {p.name for p in (PACKAGE / room).glob("*.py")} - files
    helpers = HELPERS[room]
    assert named <= helpers, f"{sorted(named - helpers)}: in no table of {room}, nor a known helper"
    assert helpers <= named, f"{sorted(helpers - named)}: listed as helpers, and are not"


# Files that are no component: what components share.
HELPERS: dict[str, set[str]] = {
    "objectives": {"__init__.py", "contrastive.py", "pairs.py"},
    "evals": {
        "__init__.py",
        "checks.py",
        "predictor.py",
        "protocol.py",
        "ranks.py",
        "results.py",
        "ridge.py",
        "templates.py",
        "captioner.py",
    },
    "data": {
        "__init__.py",
        "caption_sampler.py",
        "clip_bpe.py",
        "record_fields.py",
        "image.py",
        "pipeline.py",
        "record.py",
        "resample.py",
        "rows.py",
        "sources.py",
        "subset.py",
        "feature_store.py",
        "tar_index.py",
        "tokenizer.py",
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
