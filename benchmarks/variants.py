"""Code shared by coca.py and locking.py: train several variants and seeds, and print a table."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imgtune_jax.json_lines import read_json_lines

I2T, T2I = "text_retrieval_recall", "image_retrieval_recall"


@dataclass(frozen=True)
class Column:
    """A metric in a run's results, and its title in the table.

    The metric is multiplied by `factor`; 100 converts a fraction to percent.
    """

    dataset: str
    metric: str
    title: str
    factor: float = 100.0


def build_parser(doc: str | None, output: str) -> argparse.ArgumentParser:
    """Return a parser with the options that coca.py and locking.py share."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(output))
    return parser


def run_all(
    config: str, variants: Sequence[str], seeds: int, columns: Sequence[Column], output: Path
) -> None:
    """Train each variant with each seed, print a Markdown table, and write `table.json`.

    A run that an earlier call finished is not repeated. A run's seconds are those of its process,
    including start-up, compilation and evaluation.
    """
    rows: dict[str, list[list[float | None]]] = {variant: [] for variant in variants}
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for seed in range(seeds):
        for variant in variants:
            workdir = output / f"{variant}_seed{seed}"
            seconds[variant].append(_train(f"{config}:{variant}", workdir, seed))
            rows[variant].append(_read_results(workdir, columns))
    titles = [c.title for c in columns]
    print(f"| | {' | '.join(titles)} | seconds per run |")
    print("|---" * (len(columns) + 2) + "|")
    for variant, runs in rows.items():
        cells = [
            _format_mean([x for x in column if x is not None]) for column in zip(*runs, strict=True)
        ]
        print(f"| {variant} | {' | '.join(cells)} | {statistics.median(seconds[variant]):.0f} |")
    table = {"columns": titles, "rows": rows, "seconds": seconds}
    (output / "table.json").write_text(json.dumps(table, indent=1) + "\n")


def _train(config: str, workdir: Path, seed: int) -> float:
    """Train unless an earlier call has finished this run; return the seconds that training took."""
    seconds_file = workdir / "seconds"
    if not seconds_file.exists():
        command = [sys.executable, "train.py", f"--config={config}"]
        command += [f"--workdir={workdir}", f"--config.seed={seed}"]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds_file.write_text(f"{time.perf_counter() - start:.0f}\n")
    return float(seconds_file.read_text())


def _read_results(workdir: Path, columns: Sequence[Column]) -> list[float | None]:
    """Return a run's newest value of each column; None for a data set that it does not evaluate."""
    metrics: dict[str, dict[str, float]] = {}
    for record in read_json_lines(workdir / "results.jsonl"):
        metrics[record["dataset"]] = record["metrics"]
    return [
        c.factor * metrics[c.dataset][c.metric] if c.dataset in metrics else None for c in columns
    ]


def _format_mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}" if values else "–"
