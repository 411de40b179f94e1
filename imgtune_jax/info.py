"""`imgtune info`: a summary of a run on one screen."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from imgtune_jax import config as config_lib
from imgtune_jax import data, evals, models, param_tree
from imgtune_jax.training import checkpoint
from imgtune_jax.training.experiment import Experiment, build_experiment

PARAMETER_GROUPS = (*models.COMPONENTS, "logit_scale", "logit_bias")


def summarize_run(workdir: Path) -> str:
    """Summarize a run as text: parameters, objectives, checkpoints, caches and newest results.

    Raises MissingFileError if `workdir` is not a run's folder.
    """
    config = config_lib.load_config(workdir / "config.json")
    experiment = build_experiment(config, tokenizer_dir=workdir / "tokenizer")
    lines = [f"{workdir}: {config.name}", "", *_parameter_lines(experiment), ""]
    steps = checkpoint.saved_steps(workdir)
    run_length = {k: v for k, v in vars(config.total).items() if v is not None}
    lines.append(f"objectives   {', '.join(config.objectives)}; batch {config.batch_size}")
    lines.append(f"length       {run_length}; saved steps: {', '.join(map(str, steps)) or 'none'}")
    lines += _cache_lines(workdir)
    results = _newest_results(workdir / "results.jsonl")
    if results:
        lines += ["", *_result_lines(results)]
    return "\n".join(lines)


def _cache_lines(workdir: Path) -> Iterable[str]:
    """Yield two lines per cached tower: its rows, size and time saved, and its folder."""
    path = workdir / "cache.json"
    folders = json.loads(path.read_text()) if path.exists() else {}
    for tower, folder in folders.items():
        if not Path(folder).is_dir():
            yield f"cache        {tower}: {folder} does not exist; training creates it again"
            continue
        store = data.FeatureStore.load(Path(folder))
        shape = "×".join(map(str, store.shape))
        seconds_saved = store.compute_seconds / max(store.num_rows, 1) * store.num_records
        yield (
            f"cache        {tower}: {store.num_rows} of {store.views * store.num_records} rows "
            f"({store.views} × {store.num_records} records), {shape} {store.dtype}, "
            f"{store.bytes / 1e6:.1f} MB; an epoch read from it saves {seconds_saved:.1f} s"
        )
        yield f"             in {folder}"


def _parameter_lines(experiment: Experiment) -> Iterable[str]:
    flat = param_tree.flatten(experiment.abstract_params)
    sizes = {path: math.prod(leaf.shape) for path, leaf in flat.items()}
    yield f"{'group':<12} {'component':<20} {'parameters':>12} {'locked':>12} {'trained':>12}"
    for group in PARAMETER_GROUPS:
        paths = [p for p in sizes if p == group or p.startswith(f"{group}/")]
        component = experiment.config.model.get(group) or {}
        if not paths and not component:
            continue
        name = " ".join(str(component[k]) for k in ("name", "variant") if k in component)
        locked = sum(sizes[p] for p in paths if experiment.is_frozen[p])
        total = sum(sizes[p] for p in paths)
        yield f"{group:<12} {name:<20} {total:>12,} {locked:>12,} {total - locked:>12,}"


def _newest_results(path: Path) -> list[dict[str, Any]]:
    """Return the last result of each pair of data set and model."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for record in evals.read_results(path):
        newest[(record["dataset"], record["model"])] = record
    return list(newest.values())


def _result_lines(results: list[dict[str, Any]]) -> Iterable[str]:
    for record in results:
        values = ", ".join(f"{k} {v:.4g}" for k, v in record["metrics"].items())
        yield f"{record['dataset']} ({record['model']}): {values}"
