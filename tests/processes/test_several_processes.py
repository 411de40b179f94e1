"""Two processes with one device each train as one process with two devices does."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from imgtune_jax import distributed
from imgtune_jax.errors import UserError
from imgtune_jax.json_lines import read_json_lines
from tests.debug_run import ROOT
from tests.processes.worker import CASES

LIMIT_SECONDS = 400


def free_address():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def run_workers(folder, argument_lists, devices):
    """Run one worker for each list of arguments; return their outputs. All must succeed."""
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "tests.processes.worker", str(folder)]
    workers = [
        subprocess.Popen([*command, *arguments], env=env, cwd=ROOT, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for arguments in argument_lists
    ]  # fmt: skip
    try:
        outputs = [worker.communicate(timeout=LIMIT_SECONDS)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * len(workers), "\n".join(outputs)
    return outputs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder of the runs of two processes, folder of the runs of one)."""
    two, one = (tmp_path_factory.mktemp(name) for name in ("two", "one"))
    address = free_address()
    run_workers(two, [[address, "2", str(i)] for i in range(2)], devices=1)
    run_workers(one, [[]], devices=2)
    return two, one


@pytest.mark.parametrize("case", CASES)
def test_metrics_equal_those_of_one_process(runs, case):
    ours, expected = (read_json_lines(folder / case / "metrics.jsonl") for folder in runs)
    assert len(ours) == len(expected) > 0
    for record, other in zip(ours, expected, strict=True):
        assert record.keys() == other.keys()
        for name, value in record.items():
            np.testing.assert_allclose(value, other[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h:1", None, 0), "--processes not given; expected --coordinator=HOST:PORT"),
        ((None, None, 0), "--coordinator, --processes not given"),
        (("h", 2, 0), "--coordinator=h; expected HOST:PORT"),
        (("h:1", 2, 2), "--process=2 of --processes=2; expected 0 to 1"),
    ],
)
def test_flags_that_do_not_fit_are_an_error(arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.initialize(*arguments)


@pytest.mark.parametrize("process", [0, 1])
def test_process_without_the_others_ends_with_a_message(process):
    code = (
        f"from imgtune_jax import distributed\n"
        f"distributed.initialize('{free_address()}', 2, {process}, timeout=1)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1
    assert done.stderr.count(f"process {process} of 2 waited 1 s for the others at") == 1
