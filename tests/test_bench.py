"""`imgtune bench data`: what it says of a config's input, and of its step."""

import subprocess
import sys

import pytest

from imgtune_jax import bench, data
from imgtune_jax.training import experiment, run
from tests.debug_run import ROOT, settings


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(bench, "RECORDS", 24)
    monkeypatch.setattr(bench, "SECONDS", 0.2)


STAGES = ["read", "decode", "decode and transform", "all of a row", "tokenize"]


def test_every_stage_is_timed_and_the_slower_side_named():
    config = settings(batch_size=16)
    found = bench.measure(config)
    assert list(found.stages) == [*STAGES, "tokenize and batch", "put on the device"]
    assert all(speed > 0 for speed in found.stages.values())
    assert found.stages["all of a row"] < found.stages["decode"]
    text = bench.format_table(found, config)
    for speed in (*found.stages.values(), found.pipeline, found.step):
        assert f" {speed:.0f}" in text
    assert f"{found.bottleneck} limits this run" in text


@pytest.mark.parametrize("pipeline, step, limit", [(10.0, 20.0, "input"), (20.0, 10.0, "compute")])
def test_the_slower_side_limits(pipeline, step, limit):
    assert bench.Throughput({}, pipeline, step).bottleneck == limit


def test_a_slow_stage_is_seen(monkeypatch):
    exp = experiment.build_experiment(settings(batch_size=16))
    pipeline = run.training_pipeline(exp, data.build_source(exp.config.data.source))
    decode = bench.image.decode_image
    before = bench.time_stages(pipeline)
    monkeypatch.setattr(bench.image, "decode", lambda x: [decode(x) for _ in range(20)])
    after = bench.time_stages(pipeline)
    assert after["decode"] < before["decode"] / 5
    assert after["decode and transform"] > before["decode and transform"] / 5


@pytest.mark.parametrize(
    "arguments, says",
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
@pytest.mark.parametrize("inside", [True, False])
def test_a_mistake_ends_in_one_message(arguments, says, inside, tmp_path):
    if not inside:
        arguments = [a.replace("=configs/", f"={ROOT}/configs/") for a in arguments]
        says = says.replace("configs/", f"{ROOT}/configs/")
    code = f"from imgtune_jax.cli import main; main(['bench', *{arguments}])"
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            code,
        ],  # -P: a console script has no working folder in its path
        capture_output=True,
        text=True,
        cwd=ROOT if inside else tmp_path,
    )
    assert done.returncode != 0
    assert says in done.stderr and "Traceback" not in done.stderr
