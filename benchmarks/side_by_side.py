"""What the benchmarks share: interleaved timing, and tables."""

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
Arms = Mapping[str, Run]


def interleaved(arms: Arms, rounds: int, *, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each arm, one round of all arms after another.

    A machine that drifts then drifts for all. The `warmup` rounds, which compile, are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + warmup):
        for name, run in arms.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            if turn >= warmup:
                times[name].append(time.perf_counter() - began)
    return times


@dataclass(frozen=True)
class Measured:
    """Seconds of each round, and the greatest resident memory in GB, by arm."""

    times: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)


def in_processes(
    arms: Mapping[str, tuple[Callable[..., Run], tuple[Any, ...]]], rounds: int, *, warmup: int = 1
) -> Measured:
    """Like `interleaved`, each arm in a process of its own: {name: (make, arguments of make)}.

    Allocators and thread pools of one arm do not burden another then. An arm whose library is not
    installed is left out, and said so.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Connection, Any]] = {}
    measured = Measured()
    for name, (make, given) in arms.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, make, given), daemon=True)
        process.start()
        missing = ours.recv()
        if missing:
            print(f"{name} is left out: {missing}")
        else:
            workers[name] = ours, process
            measured.times[name] = []
    for turn in range(rounds + warmup):
        for name, (pipe, _) in workers.items():
            pipe.send(True)
            seconds, measured.memory[name] = pipe.recv()
            if turn >= warmup:
                measured.times[name].append(seconds)
    for pipe, process in workers.values():
        pipe.send(False)
        process.join()
    return measured


def _serve(pipe: Connection, make: Callable[..., Run], given: tuple[Any, ...]) -> None:
    try:
        run = make(*given)
    except ImportError as error:
        pipe.send(str(error))
        return
    pipe.send("")
    while pipe.recv():
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds = time.perf_counter() - began
        pipe.send((seconds, peak_memory()))


def in_a_new_process(script: str, *given: str) -> dict[str, Any]:
    """What the script prints as its last line, in JSON, and `process_s`: its whole life.

    Raises RuntimeError with the end of what it wrote when it fails.
    """
    began = time.perf_counter()
    done = subprocess.run([sys.executable, script, *given], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} {given} gave {done.returncode}:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    result["process_s"] = time.perf_counter() - began
    print(*given[1:], {k: v for k, v in result.items() if isinstance(v, float)}, flush=True)
    return result


def peak_memory() -> float:
    """The most GB that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each arm."""
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
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
        names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
        flags = next((x.partition(":")[2].split() for x in lines if x.startswith("flags")), [])
        wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        info |= {"cpu": names[0] if names else info["cpu"], "flags": sorted({*wanted} & {*flags})}
    return info


def table(
    times: Mapping[str, Sequence[float]],
    reference: str,
    memory: Mapping[str, float] | None = None,
    *,
    unit: str = "s",
) -> str:
    """Medians, ranges and how many times the reference's median each is, in Markdown."""
    m, extra = medians(times), memory or {}
    head = f"| | median {unit} | least to most | times {reference} |"
    lines = [
        head + (" peak GB |" if extra else ""),
        "|---|---|---|---|" + ("---|" if extra else ""),
    ]
    for name, values in times.items():
        spread = f"{min(values):.3g} to {max(values):.3g}"
        line = f"| {name} | {m[name]:.3g} | {spread} | {m[name] / m[reference]:.2f} |"
        lines.append(line + (f" {extra[name]:.1f} |" if extra else ""))
    return "\n".join(lines)


def write(output: Path | None, **result: Any) -> None:
    """Print the machine, and write everything as JSON where a file is named."""
    print(f"\n{json.dumps(machine())}")
    if output is not None:
        output.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")


def arguments(doc: str, *, rounds: int = 5) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    return parser
