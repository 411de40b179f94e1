"""Comparison of this checkout with another one of the same project, in alternating rounds."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from side_by_side import checkout_env, run_script

HERE = Path(__file__).resolve().parents[1]
THIS, OTHER = "this checkout", "the other checkout"

# Run in each checkout's process: build once, then time one run per line of standard input.
SERVER = """
import sys, time, jax, {module}
run = {build}
for line in sys.stdin:
    start = time.perf_counter()
    jax.block_until_ready(run())
    print(time.perf_counter() - start, flush=True)
"""


def compare_runs(
    module: str, build: str, other: Path, rounds: int, *, warmup: int = 1
) -> dict[str, list[float]]:
    """Return the seconds per round of a function that both checkouts' benchmark `module` builds.

    `build` is the expression that builds it, such as "step.ours(…)"; both checkouts must accept it.
    Each checkout has one process, and the first checkout of a round alternates. The `warmup` rounds
    are not counted. Raises RuntimeError if a process fails.
    """
    code = SERVER.format(module=module, build=build)
    paths = {THIS: HERE, OTHER: other.resolve()}
    workers = {
        name: subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=path,
            env=checkout_env(path),
        )
        for name, path in paths.items()
    }
    times: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(rounds + warmup):
        for name in _order(turn):
            seconds = _time_once(workers[name], paths[name])
            if turn >= warmup:
                times[name].append(seconds)
    for worker in workers.values():
        worker.communicate()  # closes its standard input, at which it exits
    return times


def _time_once(worker: subprocess.Popen[str], path: Path) -> float:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"the benchmark of {path} failed; its error is printed above")
    return float(line)


def compare_scripts(
    script: str, arguments: Sequence[str], other: Path, rounds: int
) -> dict[str, list[float]]:
    """Return the wall time per round of both checkouts' `benchmarks/<script>`, in seconds.

    Both must accept the arguments and print a JSON object last. Every round starts one process per
    checkout; the first checkout of a round alternates.
    """
    paths = {THIS: HERE, OTHER: other.resolve()}
    times: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(rounds):
        for name in _order(turn):
            path = paths[name]
            result = run_script(path / "benchmarks" / script, *arguments, checkout=path)
            times[name].append(result["process_s"])
    return times


def _order(turn: int) -> tuple[str, str]:
    return (THIS, OTHER) if turn % 2 == 0 else (OTHER, THIS)


def format_comparison(cases: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return both medians and the median of the rounds' ratios as a Markdown table."""
    lines = ["| | this, median s | other, median s | median ratio |", "|---|---|---|---|"]
    for name, times in cases.items():
        this, other = times[THIS], times[OTHER]
        ratio = statistics.median(a / b for a, b in zip(this, other, strict=True))
        medians = f"{statistics.median(this):.3g} | {statistics.median(other):.3g}"
        lines.append(f"| {name} | {medians} | {ratio:.3f} |")
    return "\n".join(lines)
