"""Runs that are killed at random moments and resumed, compared with a run that is not.

.venv/bin/python benchmarks/kills.py [--kills 60] [--seed 0] [--folder DIR]

The run is configs/debug.py with a locked image tower, a feature cache that fills during the first
epochs, baselines, evaluations, a moving average and checkpoints. It is killed by SIGKILL: every
fourth time while it starts, otherwise some steps after its newest checkpoint and up to half a
second later, which may be during a step, a save or an evaluation. The same call resumes it. A run
that has finished is compared with the run that was not killed, and the next one starts in a new
folder, until the number of kills is reached.

The table shows what differs. The logs must be equal byte for byte, and all arrays of all
checkpoints and all stored features bit for bit. No temporary file may be left. The exit status is 1
if anything differs. Processes are forked from one that has imported the package, and compiled
programs are cached, so that a start takes little time.
"""

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STEPS_BEFORE_KILL = 8  # at most, after the newest checkpoint
DELAY_SECONDS = 0.5  # at most, after these steps
LOGS = ("metrics.jsonl", "results.jsonl")


def build_config(cache: Path) -> Any:
    """Return the config of the run."""
    from ml_collections import ConfigDict

    from configs import base, debug, emoji
    from imgtune_jax import config

    c = debug.get_config()
    c.lock.image = True
    c.data.source = emoji.source("heldout", "google", "fluent")
    c.cache.update(path=str(cache), image_views=3)
    c.total = base.duration(steps=45)
    c.checkpoint.every = base.duration(steps=4)
    c.checkpoint.best_metric = "val/loss/loss"
    c.eval_every = base.duration(steps=6)
    test_set = dict(source=emoji.source("heldout", "google"), caption_set="name")
    retrieval = dict(name="retrieval", **test_set)
    c.evals = ConfigDict(dict(retrieval=retrieval, loss=dict(name="loss", **test_set)))
    c.baselines = ConfigDict(dict(untrained=retrieval))
    return config.parse_config(c)


def train(folder: Path, programs: Path) -> None:
    """Train, or resume, the run in `folder`."""
    import logging
    import os

    import jax

    from imgtune_jax.training import loop

    os.chdir(ROOT)
    logging.getLogger("absl").setLevel(logging.ERROR)
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    with (folder / "output.txt").open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        loop.train(build_config(folder / "cache"), folder / "run")


class Killer:
    """Starts runs, and kills them at random moments."""

    def __init__(self, seed: int, programs: Path) -> None:
        self.random, self.programs = random.Random(seed), programs
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["imgtune_jax.training.loop"])
        self.startup_seconds = 0.0  # to the first log, of the run that is not killed

    def start(self, folder: Path) -> BaseProcess:
        """Start the run in `folder`, in a new process."""
        folder.mkdir(exist_ok=True)
        process = self.context.Process(target=train, args=(folder, self.programs))
        process.start()
        return process

    def run_to_end(self, folder: Path) -> None:
        """Train the run in `folder` until it ends. Raises SystemExit if it fails."""
        process, start_time, log = self.start(folder), time.monotonic(), folder / "run" / LOGS[0]
        while process.is_alive() and not (log.exists() and log.stat().st_size):
            time.sleep(0.01)
        self.startup_seconds = self.startup_seconds or time.monotonic() - start_time
        process.join()
        _check_exit(process, folder)

    def run_and_kill(self, folder: Path) -> bool:
        """Start the run in `folder` and kill it. Return whether it ended before that."""
        at_startup = self.random.random() < 0.25
        steps = self.random.randint(1, STEPS_BEFORE_KILL)
        limit = self.startup_seconds if at_startup else DELAY_SECONDS
        delay = self.random.uniform(0, limit)
        goal = _newest_step(folder / "run") + steps
        process = self.start(folder)
        while not at_startup and process.is_alive() and _last_step(folder / "run") < goal:
            time.sleep(0.002)
        process.join(delay)
        if process.is_alive():
            process.kill()
            process.join()
            return False
        _check_exit(process, folder)
        return True


def _check_exit(process: BaseProcess, folder: Path) -> None:
    if process.exitcode != 0:
        raise SystemExit(f"status {process.exitcode}:\n{(folder / 'output.txt').read_text()}")


def _newest_step(workdir: Path) -> int:
    folders = (workdir / "checkpoints").glob("[0-9]*")
    return max((int(path.name) for path in folders if path.name.isdigit()), default=0)


def _last_step(workdir: Path) -> int:
    """Return the step of the last complete line of the log, or 0."""
    import json

    log = workdir / LOGS[0]
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def compare(run: Path, reference: Path) -> dict[str, str]:
    """Return what was compared, and the result: a count if all are equal, or the differences."""
    results = {}
    for name in LOGS:
        ours, expected = ((folder / "run" / name).read_bytes() for folder in (run, reference))
        lines = ours.count(b"\n")
        results[name] = f"{lines} lines" if ours == expected else "DIFFERS"
    for name, read in {"arrays": _saved_arrays, "features": _stored_rows}.items():
        ours, expected = dict(read(run)), dict(read(reference))
        results[name] = _compare_items(ours, expected)
    left = [*(run / "run").rglob("*"), *(run / "cache").rglob("*")]
    names = sorted(str(path.relative_to(run)) for path in left if _is_leftover(path))
    results["files left"] = f"DIFFERS: {' '.join(names)}" if names else "none"
    return results


def _compare_items(ours: Mapping[str, bytes], expected: Mapping[str, bytes]) -> str:
    keys = sorted(ours.keys() | expected.keys())
    different = [key for key in keys if ours.get(key) != expected.get(key)]
    if different:
        return f"DIFFERS: {len(different)} of {len(keys)}, such as {different[0]}"
    return f"{len(ours)}"


def _saved_arrays(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the path and the bytes of each array in the checkpoints and in `frozen`."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    workdir = (folder / "run").absolute()
    saved = [*workdir.glob("checkpoints/*/state"), *workdir.glob("frozen/*")]
    with ocp.PyTreeCheckpointer() as checkpointer:
        for path in saved:
            for key, array in jax.tree.leaves_with_path(checkpointer.restore(path)):
                name = f"{path.relative_to(workdir)}{jax.tree_util.keystr(key)}"
                yield name, np.asarray(array).tobytes()


def _stored_rows(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the id and the bytes of each stored feature."""
    import numpy as np

    from imgtune_jax.data import FeatureStore

    for path in (folder / "cache").iterdir():
        store = FeatureStore.load(path)
        for row in range(store.views * store.num_records):
            view, index = (np.array([x]) for x in divmod(row, store.num_records))
            if store.contains(view, index):
                yield f"{path.name}[{row}]", store.read(view, index)[0].tobytes()


def _is_leftover(path: Path) -> bool:
    """Whether a file is temporary, a lock, or a segment of features without its ids."""
    if path.suffix == ".array_record":
        return not path.with_suffix(".ids.npz").exists()
    return "tmp" in path.name or path.suffix == ".lock"


def main() -> None:
    """Kill runs, compare them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to train (default: a temporary folder)")
    options = parser.parse_args()
    folder = Path(options.folder or tempfile.mkdtemp(prefix="kills-")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    start_time = time.monotonic()
    killer = Killer(options.seed, folder / "programs")
    killer.run_to_end(folder / "compile")  # so that no other run compiles
    killer.startup_seconds = 0.0
    killer.run_to_end(folder / "reference")
    kills, rows = 0, []
    while kills < options.kills or not rows:
        run, kills_before, ended = folder / f"killed_{len(rows)}", kills, False
        while kills < options.kills and not ended:
            ended = killer.run_and_kill(run)
            kills += not ended
        if not ended:
            killer.run_to_end(run)
        rows.append({"kills": str(kills - kills_before)} | compare(run, folder / "reference"))
    columns = list(rows[0])
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(row[column] for column in columns))
    different = any("DIFFERS" in value for row in rows for value in row.values())
    minutes = (time.monotonic() - start_time) / 60
    print(f"{kills} kills in {minutes:.1f} min, seed {options.seed}; runs are in {folder}")
    raise SystemExit(1 if different else 0)


if __name__ == "__main__":
    main()
