"""What the experiments share: training runs of several arms and seeds, and a table of them."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

I2T, T2I = "text_retrieval_recall", "image_retrieval_recall"


@dataclass(frozen=True)
class Column:
    """A figure of a run's results, and what the table calls it; `times` makes it percent."""

    dataset: str
    metric: str
    title: str
    times: float = 100.0


def arguments(doc: str, output: str) -> argparse.ArgumentParser:
    """A parser with what every experiment takes."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(output))
    return parser


def run_all(
    config: str, arms: Sequence[str], seeds: int, columns: Sequence[Column], output: Path
) -> None:
    """Train each arm with each seed, print the table in Markdown, keep it as `table.json`.

    A finished run is not run again. A run's seconds are of the whole process: start-up,
    compilation and evaluation included.
    """
    rows: dict[str, list[list[float | None]]] = {arm: [] for arm in arms}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for seed in range(seeds):
        for arm in arms:
            workdir = output / f"{arm}_seed{seed}"
            seconds[arm].append(_run(f"{config}:{arm}", workdir, seed))
            rows[arm].append(_results(workdir, columns))
    titles = [c.title for c in columns]
    print(f"| | {' | '.join(titles)} | seconds a run |")
    print("|---" * (len(columns) + 2) + "|")
    for arm, runs in rows.items():
        cells = [_cell([x for x in column if x is not None]) for column in zip(*runs, strict=True)]
        print(f"| {arm} | {' | '.join(cells)} | {statistics.median(seconds[arm]):.0f} |")
    table = {"columns": titles, "rows": rows, "seconds": seconds}
    (output / "table.json").write_text(json.dumps(table, indent=1) + "\n")


def _run(config: str, workdir: Path, seed: int) -> float:
    """Train unless it is done; the seconds that it took."""
    kept = workdir / "seconds"
    if not kept.exists():
        command = [sys.executable, "train.py", f"--config={config}"]
        command += [f"--workdir={workdir}", f"--config.seed={seed}"]
        began = time.perf_counter()
        subprocess.run(command, check=True, env=os.environ | {"WANDB_MODE": "disabled"})
        kept.write_text(f"{time.perf_counter() - began:.0f}\n")
    return float(kept.read_text())


def _results(workdir: Path, columns: Sequence[Column]) -> list[float | None]:
    """A run's last results; None for what its arm does not judge."""
    found: dict[str, dict[str, float]] = {}
    for line in (workdir / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        found[record["dataset"]] = record["metrics"]
    return [c.times * found[c.dataset][c.metric] if c.dataset in found else None for c in columns]


def _cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}" if values else "–"
