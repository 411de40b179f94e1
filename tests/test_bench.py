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
    assert speeds.stages["full row"] < speeds.stages["decode"]
    text = bench.format_table(speeds, config)
    for speed in (*speeds.stages.values(), speeds.pipeline, speeds.step):
        assert f" {speed:.0f}" in text
    assert f"{speeds.bottleneck} limits this run" in text


@pytest.mark.parametrize("pipeline, step, limit", [(10.0, 20.0, "input"), (20.0, 10.0, "compute")])
def test_slower_side_is_the_bottleneck(pipeline, step, limit):
    assert bench.Throughput({}, pipeline, step).bottleneck == limit


def test_slow_stage_is_measured_as_slow(monkeypatch):
    """The clock advances by one second per decoded image, and by 1 ms when it is read."""
    pipeline = experiment.build_experiment(settings(batch_size=16)).pipeline
    decode, now = bench.image.decode_image, [0.0]

    def slow_decode(image):
        now[0] += 1.0
        return decode(image)

    def clock():
        now[0] += 1e-3
        return now[0]

    monkeypatch.setattr(bench.image, "decode_image", slow_decode)
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=clock))
    speeds = bench.time_stages(pipeline)
    assert speeds["decode"] == pytest.approx(1.0, rel=1e-3)
    assert min(speeds[stage] for stage in speeds if stage != "decode") > 1000


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
