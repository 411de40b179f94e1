"""How much locking helps: all arms of configs/locking_emoji.py, several seeds.

python benchmarks/locking.py [--seeds 3] [--full] [--output runs/locking]

Prints a Markdown table of means and standard deviations over seeds, with the median wall time of a
run, and writes it as JSON. A finished run is not run again. --full: as long as the demo.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ARMS = ("locked", "unlocked", "scratch")
COLUMNS = [
    ("emoji_s", "text_retrieval_recall@1", "S i→t R@1"),
    ("emoji_s", "image_retrieval_recall@1", "S t→i R@1"),
    ("emoji_g", "text_retrieval_recall@5", "G i→t R@5"),
    ("emoji_g", "image_retrieval_recall@5", "G t→i R@5"),
    ("emoji_f", "text_retrieval_recall@5", "F i→t R@5"),
    ("emoji_f", "image_retrieval_recall@5", "F t→i R@5"),
]


def run(arm: str, workdir: Path, seed: int) -> None:
    """Train one arm with one seed, unless it is done; its wall time goes to `seconds`."""
    if (workdir / "seconds").exists():
        return
    command = [sys.executable, "train.py", f"--config=configs/locking_emoji.py:{arm}"]
    command += [f"--workdir={workdir}", f"--config.seed={seed}"]
    began = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ | {"WANDB_MODE": "disabled"})
    (workdir / "seconds").write_text(f"{time.perf_counter() - began:.0f}\n")


def recalls(workdir: Path) -> list[float]:
    """A run's last results, in the order of COLUMNS, in percent."""
    found = {}
    for line in (workdir / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        found[record["dataset"]] = record["metrics"]
    return [100 * found[dataset][metric] for dataset, metric, _ in COLUMNS]


def main() -> None:
    """Run all arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="the demo's size; an hour a seed")
    parser.add_argument("--output", type=Path, default=Path("runs/locking"))
    options = parser.parse_args()
    rows: dict[str, list[list[float]]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        for arm in ARMS:
            form = f"{arm}-full" if options.full else arm
            workdir = options.output / f"{form}_seed{seed}"
            run(form, workdir, seed)
            rows.setdefault(arm, []).append(recalls(workdir))
            seconds.setdefault(arm, []).append(float((workdir / "seconds").read_text()))
    print("| image tower | " + " | ".join(c[2] for c in COLUMNS) + " | seconds a run |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for arm, runs in rows.items():
        columns = list(zip(*runs, strict=True))
        cells = [f"{statistics.mean(c):.1f} ± {statistics.pstdev(c):.1f}" for c in columns]
        print(f"| {arm} | " + " | ".join(cells) + f" | {statistics.median(seconds[arm]):.0f} |")
    summary = {"rows": rows, "seconds": seconds, "columns": [c[2] for c in COLUMNS]}
    (options.output / "locking.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
