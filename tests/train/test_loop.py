"""The loop from outside: resuming, devices, refusing, stopping. Real corpus, tiny model."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from imgtune_jax import cache, config
from imgtune_jax.data import TooManyBadRecords
from imgtune_jax.train import checkpoint, loop

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "train.py", "--config=configs/debug.py"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def settings(**changes):
    """The debug config with dotted keys changed."""
    spec = importlib.util.spec_from_file_location("debug", ROOT / "configs" / "debug.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config()
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        node = c
        for part in parents:
            node = node[part]
        with node.ignore_type():
            node[leaf] = value
    return config.parse(c)


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return np.array([m["train/loss"] for m in metrics(workdir) if "train/loss" in m])


def start(workdir, devices=1):
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen([*COMMAND, f"--workdir={workdir}"], env=env, cwd=ROOT)


def signal_after(process, workdir, lines, which, limit=240):
    """Send a signal as soon as metrics.jsonl has so many lines; the exit code."""
    path = workdir / "metrics.jsonl"
    began = time.monotonic()
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() - began < limit, "the run makes no progress"
        time.sleep(0.02)
    process.send_signal(which)
    return process.wait(timeout=limit)


def test_a_killed_run_ends_as_if_it_had_never_been_killed(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole).wait(timeout=400) == 0
    assert signal_after(start(broken), broken, 3, signal.SIGTERM) == 143
    (saved,) = checkpoint.saved_steps(broken)
    assert saved not in range(0, 31, 5) or saved >= 3  # saved where it was stopped
    assert signal_after(start(broken), broken, 13, signal.SIGKILL) == -9
    assert checkpoint.saved_steps(broken)[-1] < 30
    assert start(broken).wait(timeout=400) == 0
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert len(losses(whole)) == 30


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """The loss curve of the debug config on one device."""
    workdir = tmp_path_factory.mktemp("one")
    assert start(workdir, devices=1).wait(timeout=400) == 0
    return losses(workdir)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=["data", "fsdp", "mixed"])
def test_one_and_eight_devices_give_one_loss_curve(one_device, tmp_path, mesh):
    sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    loop.run(settings(**sizes), tmp_path)
    np.testing.assert_allclose(losses(tmp_path)[:20], one_device[:20], rtol=1e-5)


def test_accumulated_run_equals_whole_run(one_device, tmp_path):
    # dropout draws another mask for another microbatch, so it is off in both
    off = {"model.image": dict(name="vit", variant="mu/16", pool="attention"), "total.steps": 8}
    loop.run(settings(**off), tmp_path / "whole")
    loop.run(settings(**off, accumulation=4), tmp_path / "parts")
    a, b = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    np.testing.assert_allclose(b, a, rtol=1e-5)
    assert not np.allclose(a, one_device[:8], rtol=1e-5), "dropout makes no difference"


LIT = {
    "lock.image": True,
    "total.steps": 8,
    "data.transforms": (),
    "model.image_head": dict(name="linear", standardize=True),
}


def test_cached_run_equals_uncached_run(tmp_path):
    cached = {"cache.enabled": True, "cache.dir": str(tmp_path / "cache")}
    loop.run(settings(**LIT), tmp_path / "uncached")
    loop.run(settings(**LIT, **cached), tmp_path / "cached", features=cache.features)
    # the tower sees other batches when it fills the cache, so float32 sums round otherwise
    np.testing.assert_allclose(
        losses(tmp_path / "cached"), losses(tmp_path / "uncached"), rtol=2e-5
    )


def test_cache_is_shared_and_its_key_covers_weights_views_and_preprocessing(tmp_path):
    folder = tmp_path / "cache"
    base = {**LIT, "total.steps": 1, "cache.enabled": True, "cache.dir": str(folder)}

    def entries(name, **changes):
        loop.run(settings(**{**base, **changes}), tmp_path / name, features=cache.features)
        return {p.name for p in folder.glob("*.npy") if "valid" not in p.name}

    first = entries("a")
    assert entries("b", **{"optim.lr": 0.5}) == first, "another rate is another run, one cache"
    assert len(entries("c", seed=1)) == 2, "other (random) weights"
    assert len(entries("d", **{"cache.views": 2})) == 3
    other = (dict(name="resize", size=64, mode="squash", interpolation="bilinear"),)
    assert len(entries("e", preprocess=other)) == 4


def test_checkpoints_hold_no_locked_parameter(tmp_path):
    loop.run(settings(**{**LIT, "total.steps": 2}), tmp_path)
    saved = {p.name for p in (tmp_path / "checkpoints" / "2" / "state").rglob("*")}
    text = " ".join(saved) + (tmp_path / "checkpoints/2/state/_METADATA").read_text()
    assert "patch_embed" not in text and "token_embed" in text
    assert list((tmp_path / "frozen").iterdir())


def test_a_relative_workdir_works(tmp_path, monkeypatch):
    os.symlink(ROOT / "corpora", tmp_path / "corpora")
    monkeypatch.chdir(tmp_path)
    loop.run(settings(**{"total.steps": 1}), Path("runs/here"))
    assert checkpoint.saved_steps(tmp_path / "runs" / "here") == [1]


def test_another_config_in_the_same_folder_is_refused(tmp_path):
    loop.run(settings(**{"total.steps": 1}), tmp_path)
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.001 there, 0\.5 now"):
        loop.run(settings(**{"total.steps": 1, "optim.lr": 0.5}), tmp_path)
    loop.run(settings(**{"total.steps": 1, "log_every": 2}), tmp_path)  # this may change


def test_a_loss_that_is_not_finite_names_step_and_last_good_checkpoint(tmp_path):
    """Features of the second epoch are poisoned: step 3 has no finite loss."""

    def poisoned(exp, params, source):
        values = np.ones((2, len(source), exp.model.feature_dim()), np.float32)
        values[1] = np.nan
        return values, np.ones(len(source), bool)

    changes = {"lock.image": True, "cache.enabled": True, "batch_size": 1568}
    changes |= {"checkpoint.every.steps": 1, "model.image_head": dict(name="linear")}
    with pytest.raises(loop.NotFiniteError, match=r"loss is nan at step 3; .*checkpoints/1\."):
        loop.run(settings(**changes), tmp_path, features=poisoned)


def test_locking_everything_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to train"):
        loop.run(settings(**{"lock.patterns": (".*",)}), tmp_path)


def test_metrics_use_the_names_that_users_know(tmp_path):
    evals = {"toy": dict(name="retrieval", source=heldout(), caption_set="name")}
    loop.run(settings(**{"total.steps": 2, "evals": evals, "checkpoint.best_metric":
                         "val/toy/image_to_text_R@1"}), tmp_path)  # fmt: skip
    first, second, judged = metrics(tmp_path)
    assert {"train/loss", "train/lr", "train/logit_scale"} <= first.keys() & second.keys()
    assert {"val/toy/image_to_text_R@1", "val/toy/text_to_image_R@10"} <= judged.keys()
    (result,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert result["dataset"] == "toy" and "image_retrieval_recall@5" in result["metrics"]
    assert all(np.isfinite(v) for v in jax.tree.leaves(result["metrics"]))


def heldout():
    return dict(
        name="webdataset", path="corpora/emoji/heldout.tar", image=("google.webp",),
        captions=dict(name=("name", "en")), group=("concept",),
    )  # fmt: skip


def broken_folder(folder):
    """Forty pictures, of which four are broken in four ways; one more has no caption."""
    rng = np.random.default_rng(0)
    rows = ["filepath,title"]
    for i in range(40):
        pixels = rng.integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
        rows.append(f"{i}.jpg,{'' if i == 4 else f'picture number {i}'}")
    whole = (folder / "0.jpg").read_bytes()
    (folder / "0.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "1.jpg").write_bytes(b"no image at all")
    (folder / "2.jpg").unlink()
    Image.new("1", (20000, 10000)).save(folder / "3.png")
    (folder / "3.png").rename(folder / "3.jpg")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    return dict(name="folder", path=str(folder), table=str(folder / "pairs.csv"))


def test_training_goes_on_over_broken_records_and_counts_them(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    changes = {
        "data.source": broken_folder(tmp_path / "data"),
        "data.captions": {"caption": 1.0},
        "batch_size": 40,
        "total.steps": 2,
        "data.max_bad_fraction": 0.2,
        "data.min_records": 40,
    }
    with caplog.at_level("WARNING", logger="imgtune_jax.data"):
        loop.run(settings(**changes), tmp_path / "run")
    assert np.all(np.isfinite(losses(tmp_path / "run")))
    record = tmp_path / "run" / "checkpoints" / "2" / "record" / "metadata"
    counted = json.loads(record.read_text())["bad_records"]
    causes = {"truncated_image", "not_an_image", "missing_image", "too_many_pixels"}
    assert counted.keys() == causes | {"missing_caption", "seen"}
    assert all(counted[c] == counted["seen"] // 40 for c in causes)
    assert all(f"{i}.jpg" in caplog.text for i in range(5))
    changes["data.max_bad_fraction"] = 0.1
    with pytest.raises(TooManyBadRecords, match=r"5 of 40 records are broken \(12\.5%, allowed"):
        loop.run(settings(**changes), tmp_path / "capped")
