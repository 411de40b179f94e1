"""Code shared by the benchmarks: timing of variants in turn, tables, results as JSON."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax

Run = Callable[[], object]


@dataclass(frozen=True)
class Measurements:
    """Seconds of each round, and peak resident memory in GB, by variant."""

    times: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)


def time_in_processes(
    variants: Mapping[str, tuple[Callable[..., Run], tuple[Any, ...]]],
    rounds: int,
    *,
    warmup: int = 1,
) -> Measurements:
    """Time each variant, {name: (build, arguments of build)}, in a separate process.

    A round runs every variant once, so a change of the machine's speed affects all of them. The
    variants have separate processes, so that they share no allocator and no thread pool. The first
    `warmup` rounds, which compile, are not counted. A variant whose library is not installed is
    skipped with a message.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Connection, Any]] = {}
    measurements = Measurements()
    for name, (build, arguments) in variants.items():
        pipe, worker_pipe = context.Pipe()
        process = context.Process(target=_serve, args=(worker_pipe, build, arguments), daemon=True)
        process.start()
        import_error = pipe.recv()
        if import_error:
            print(f"{name} is skipped: {import_error}")
        else:
            workers[name] = pipe, process
            measurements.times[name] = []
    for round_index in range(rounds + warmup):
        for name, (pipe, _) in workers.items():
            pipe.send(True)
            seconds, measurements.memory[name] = pipe.recv()
            if round_index >= warmup:
                measurements.times[name].append(seconds)
    for pipe, process in workers.values():
        pipe.send(False)
        process.join()
    return measurements


def _serve(pipe: Connection, build: Callable[..., Run], arguments: tuple[Any, ...]) -> None:
    """Run and time a variant in a worker process, once for each True that the pipe receives."""
    try:
        run = build(*arguments)
    except ImportError as error:
        pipe.send(str(error))
        return
    pipe.send("")
    while pipe.recv():
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds = time.perf_counter() - start
        pipe.send((seconds, peak_memory()))


def run_script(script: str | Path, *arguments: str, checkout: Path | None = None) -> dict[str, Any]:
    """Run a script; return the JSON object in its last line of output, with its wall time added.

    The wall time, in seconds, has the key `process_s`. With `checkout`, the script runs in that
    folder and imports from it. If the script fails, raises RuntimeError with the end of its
    standard error.
    """
    start = time.perf_counter()
    completed = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        cwd=checkout,
        env=None if checkout is None else checkout_env(checkout),
    )
    if completed.returncode:
        end_of_errors = completed.stderr[-2000:]
        raise RuntimeError(
            f"{script} {arguments} exited with code {completed.returncode}:\n{end_of_errors}"
        )
    result = json.loads(completed.stdout.splitlines()[-1])
    result["process_s"] = time.perf_counter() - start
    print(*arguments[1:], {k: v for k, v in result.items() if isinstance(v, float)}, flush=True)
    return result


def checkout_env(checkout: Path) -> dict[str, str]:
    """Return an environment in which Python imports a checkout's package and its benchmarks."""
    return os.environ | {"PYTHONPATH": f"{checkout}{os.pathsep}{checkout / 'benchmarks'}"}


def peak_memory() -> float:
    """Return the peak resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of each variant."""
    return {name: statistics.median(values) for name, values in times.items()}


def machine_info() -> dict[str, Any]:
    """Return the hardware and the software versions that measurements depend on."""
    info: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "devices": sorted({d.device_kind for d in jax.devices()}),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        flag_lines = [line for line in lines if line.startswith("flags")]
        flags = flag_lines[0].partition(":")[2].split() if flag_lines else []
        relevant = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        cpu = names[0] if names else info["cpu"]
        info |= {"cpu": cpu, "flags": sorted({*relevant} & {*flags})}
    return info


def format_table(
    times: Mapping[str, Sequence[float]],
    reference: str,
    memory: Mapping[str, float] | None = None,
    *,
    unit: str = "s",
) -> str:
    """Return a Markdown table with a row per variant: median, range, median / reference's median.

    `reference` is the name of a variant. `memory` adds a column of peak memory in GB.
    """
    median_of, peak_gb = medians(times), memory or {}
    header = f"| | median {unit} | min to max | relative to {reference} |"
    lines = [
        header + (" peak GB |" if peak_gb else ""),
        "|---|---|---|---|" + ("---|" if peak_gb else ""),
    ]
    for name, values in times.items():
        median = median_of[name]
        min_to_max = f"{min(values):.3g} to {max(values):.3g}"
        line = f"| {name} | {median:.3g} | {min_to_max} | {median / median_of[reference]:.2f} |"
        lines.append(line + (f" {peak_gb[name]:.1f} |" if peak_gb else ""))
    return "\n".join(lines)


def write_results(output: Path | None, **results: Any) -> None:
    """Print `machine_info`; if `output` is given, also write it and the results there as JSON."""
    print(f"\n{json.dumps(machine_info())}")
    if output is not None:
        output.write_text(json.dumps({"machine": machine_info(), **results}, indent=1) + "\n")


def build_parser(doc: str | None, *, rounds: int = 5) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--output", type=Path, help="JSON file to write the results to")
    return parser
