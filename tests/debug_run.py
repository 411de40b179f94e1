"""Helpers of several tests, which train configs/debug.py with changes."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from imgtune_jax import config, json_lines

ROOT = Path(__file__).parents[1]


def config_dict(kind=""):
    """Return the debug config as a ConfigDict; `kind` is its argument, such as "coca"."""
    spec = importlib.util.spec_from_file_location("debug", ROOT / "configs" / "debug.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(kind)


def settings(kind="", **changes):
    """Return the parsed debug config, with `changes` by dotted key."""
    debug_config = config_dict(kind)
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        node = debug_config
        for parent in parents:
            node = node[parent]
        with node.ignore_type():
            node[leaf] = value
    return config.parse_config(debug_config)


def metrics(workdir):
    """Return the records of metrics.jsonl."""
    return json_lines.read_json_lines(workdir / "metrics.jsonl")


def losses(workdir):
    """Return the logged training losses."""
    return np.array([line["train/loss"] for line in metrics(workdir) if "train/loss" in line])


def start(workdir, *changes, devices=1, kind=""):
    """Start train.py on the debug config in another process; return the process."""
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "train.py", f"--config=configs/debug.py{kind and ':' + kind}"]
    return subprocess.Popen([*command, f"--workdir={workdir}", *changes], env=env, cwd=ROOT)


def signal_after(process, workdir, num_lines, signum, limit=240):
    """Send a signal as soon as metrics.jsonl has `num_lines` lines; return the exit code."""
    path = workdir / "metrics.jsonl"
    start_time = time.monotonic()
    while not path.exists() or path.read_bytes().count(b"\n") < num_lines:
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() - start_time < limit, "the run makes no progress"
        time.sleep(0.02)
    process.send_signal(signum)
    return process.wait(timeout=limit)
