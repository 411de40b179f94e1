"""`imgtune info`: what a run is, in a screenful."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from imgtune_jax import config as config_lib
from imgtune_jax import data, models, param_tree
from imgtune_jax.training import checkpoint, experiment

PARAMETER_GROUPS = (*models.COMPONENTS, "logit_scale", "logit_bias")


def summarize_run(workdir: Path) -> str:
    """Text about a run: towers, parameters locked and trained, checkpoints, newest results.

    Raises FileNotFoundError when `workdir` is no run's folder.
    """
    config = config_lib.load_config(workdir / "config.json")
    exp = experiment.build_experiment(config, tokenizer_dir=workdir / "tokenizer")
    lines = [f"{workdir}: {config.name}", "", *_parameters(exp), ""]
    steps = checkpoint.saved_steps(workdir)
    length = {k: v for k, v in vars(config.total).items() if v is not None}
    lines.append(f"objectives   {', '.join(config.objectives)}; batch {config.batch_size}")
    lines.append(f"length       {length}; saved steps: {', '.join(map(str, steps)) or 'none'}")
    lines += _caches(workdir)
    results = _results(workdir / "results.jsonl")
    if results:
        lines += ["", *_table(results)]
    return "\n".join(lines)


def _caches(workdir: Path) -> Iterable[str]:
    """Of each cached tower: what is stored, where, under which key, and what it spares."""
    path = workdir / "cache.json"
    folders = json.loads(path.read_text()) if path.exists() else {}
    for tower, folder in folders.items():
        if not Path(folder).is_dir():
            yield f"cache        {tower}: was in {folder}, which is gone; training makes it anew"
            continue
        store = data.FeatureStore.load(Path(folder))
        what = "×".join(map(str, store.shape))
        spared = store.compute_seconds / max(store.num_rows, 1) * store.num_records
        yield (
            f"cache        {tower}: {store.num_rows} of {store.views * store.num_records} rows "
            f"({store.views} × {store.num_records} records), {what} {store.dtype}, "
            f"{store.bytes / 1e6:.1f} MB; an epoch read from it spares {spared:.1f} s"
        )
        yield f"             in {folder}"


def _parameters(exp: experiment.Experiment) -> Iterable[str]:
    flat = param_tree.flatten(exp.abstract_params)
    sizes = {path: math.prod(leaf.shape) for path, leaf in flat.items()}
    yield f"{'part':<12} {'component':<20} {'parameters':>12} {'locked':>12} {'trained':>12}"
    for part in PARAMETER_GROUPS:
        mine = {p: n for p, n in sizes.items() if p == part or p.startswith(f"{part}/")}
        if not mine and not exp.config.model.get(part):
            continue
        component = exp.config.model.get(part) or {}
        label = " ".join(str(component[k]) for k in ("name", "variant") if k in component)
        locked = sum(n for p, n in mine.items() if exp.is_frozen[p])
        total = sum(mine.values())
        yield f"{part:<12} {label:<20} {total:>12,} {locked:>12,} {total - locked:>12,}"


def _results(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        newest[(record["dataset"], record["model"])] = record
    return list(newest.values())


def _table(results: list[dict[str, Any]]) -> Iterable[str]:
    for record in results:
        values = ", ".join(f"{k} {v:.4g}" for k, v in record["metrics"].items())
        yield f"{record['dataset']} ({record['model']}): {values}"
