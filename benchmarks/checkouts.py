"""Comparison of the speed of this checkout with that of another checkout of this project."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from side_by_side import checkout_env, run_script

ROOT = Path(__file__).resolve().parents[1]
THIS, OTHER = "this checkout", "the other checkout"

# This code runs in each checkout's process. It builds a function, and then times one call of it for
# each line of standard input.
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
    """Time a function of both checkouts; return the seconds of each round by checkout.

    `module` is a benchmark, and `build` an expression that builds the function in it, such as
    "step.ours(…)"; it must be valid in both checkouts. Each checkout has one process. Rounds
    alternate which checkout runs first. The first `warmup` rounds are not counted. Raises
    RuntimeError if a process fails.
    """
    code = SERVER.format(module=module, build=build)
    paths = {THIS: ROOT, OTHER: other.resolve()}
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
    for round_index in range(rounds + warmup):
        for name in _order(round_index):
            seconds = _time_once(workers[name], paths[name])
            if round_index >= warmup:
                times[name].append(seconds)
    for worker in workers.values():
        worker.communicate()  # closes its standard input, so that it exits
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
    """Time `benchmarks/<script>` of both checkouts; return the wall time of each round in seconds.

    Both scripts must accept the arguments, and print a JSON object as their last line. Every round
    starts one process per checkout. Rounds alternate which checkout runs first.
    """
    paths = {THIS: ROOT, OTHER: other.resolve()}
    times: dict[str, list[float]] = {name: [] for name in paths}
    for round_index in range(rounds):
        for name in _order(round_index):
            path = paths[name]
            result = run_script(path / "benchmarks" / script, *arguments, checkout=path)
            times[name].append(result["process_s"])
    return times


def _order(round_index: int) -> tuple[str, str]:
    """Return the order of the checkouts in a round."""
    return (THIS, OTHER) if round_index % 2 == 0 else (OTHER, THIS)


def format_comparison(cases: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return a Markdown table with a row per case: both medians, and the median of the ratios.

    A ratio is the time of this checkout divided by that of the other, in the same round.
    """
    lines = ["| | this, median s | other, median s | median this / other |", "|---|---|---|---|"]
    for name, times in cases.items():
        this, other = times[THIS], times[OTHER]
        ratio = statistics.median(a / b for a, b in zip(this, other, strict=True))
        medians = f"{statistics.median(this):.3g} | {statistics.median(other):.3g}"
        lines.append(f"| {name} | {medians} | {ratio:.3f} |")
    return "\n".join(lines)
