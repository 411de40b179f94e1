"""`imgtune bench data`: the speed of a config's training input and training step."""

import subprocess
import sys
import types

import pytest

from imgtune_jax import bench
from imgtune_jax.training import experiment
from tests.debug_run import ROOT, settings


@pytest.fixture(autouse=True)
def in_root_and_quick(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(bench, "NUM_RECORDS", 24)
    monkeypatch.setattr(bench, "PIPELINE_SECONDS", 0.2)


STAGES = ["read", "decode", "decode and transform", "full row", "tokenize"]


def test_table_has_every_stage_and_names_the_bottleneck():
    config = settings(batch_size=16)
    speeds = bench.measure(config)
    assert list(speeds.stages) == [*STAGES, "tokenize and batch", "put on the device"]
    assert all(speed > 0 for speed in speeds.stages.values())
    text = bench.format_table(speeds, config)
    for speed in (*speeds.stages.values(), speeds.pipeline, speeds.step):
        assert f" {speed:.0f}" in text
    assert f"{speeds.bottleneck} limits this run" in text


@pytest.mark.parametrize("pipeline, step, limit", [(10.0, 20.0, "input"), (20.0, 10.0, "compute")])
def test_slower_side_is_the_bottleneck(pipeline, step, limit):
    assert bench.Throughput({}, pipeline, step).bottleneck == limit


@pytest.mark.parametrize(
    "slow_function, slow_stages",
    [
        ("decode_image", ["decode"]),
        # `decode_image` and the rows of training call it, too.
        ("open_image", ["decode", "decode and transform", "full row"]),
    ],
)
def test_slow_stage_is_measured_as_slow(slow_function, slow_stages, monkeypatch):
    """The clock advances by one second per call of the function, and by 1 ms when it is read."""
    pipeline = experiment.build_experiment(settings(batch_size=16)).pipeline
    function, now = getattr(bench.image, slow_function), [0.0]

    def slow(*args, **kwargs):
        now[0] += 1.0
        return function(*args, **kwargs)

    def clock():
        now[0] += 1e-3
        return now[0]

    monkeypatch.setattr(bench.image, slow_function, slow)
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=clock))
    speeds = bench.time_stages(pipeline)
    for stage in slow_stages:
        assert speeds[stage] == pytest.approx(1.0, rel=1e-3)
    assert min(speed for stage, speed in speeds.items() if stage not in slow_stages) > 1000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["steps"], "invalid choice: 'steps'"),
        (["data"], "config"),
        (["data", "--config=configs/no.py"], "no config at 'configs/no.py'"),
        (["data", "--config=configs/debug.py", "--config.data.source.path=no.tar"], "no tar at"),
        (
            ["data", "--config=configs/lit_emoji.py", "--config.data.source.path=no.tar"],
            "no tar at",
        ),
    ],
)
@pytest.mark.parametrize("in_root", [True, False])
def test_user_error_is_one_message(arguments, message, in_root, tmp_path):
    if not in_root:
        arguments = [a.replace("=configs/", f"={ROOT}/configs/") for a in arguments]
        message = message.replace("configs/", f"{ROOT}/configs/")
    code = f"from imgtune_jax.cli import main; main(['bench', *{arguments}])"
    process = subprocess.run(
        # With -P, the working folder is not in the import path, as for a console script.
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT if in_root else tmp_path,
    )
    assert process.returncode != 0
    assert message in process.stderr and "Traceback" not in process.stderr
