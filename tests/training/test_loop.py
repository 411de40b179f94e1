"""Training runs of a tiny model on the real corpus: resuming, meshes, errors, saved files."""

import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from imgtune_jax import models
from imgtune_jax.data import TooManyBadRecordsError
from imgtune_jax.errors import NonFiniteLossError
from imgtune_jax.training import batch_source, checkpoint, loop
from tests.debug_run import ROOT, losses, metrics, settings, signal_after, start


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_stopped_killed_and_resumed_run_equals_uninterrupted_run(tmp_path):
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    assert start(uninterrupted).wait(timeout=400) == 0
    assert signal_after(start(killed), killed, 3, signal.SIGTERM) == 143
    (saved,) = checkpoint.saved_steps(killed)
    assert saved > 0  # SIGTERM saves the current step
    assert signal_after(start(killed), killed, 13, signal.SIGKILL) == -9
    assert checkpoint.saved_steps(killed)[-1] < 30
    assert start(killed).wait(timeout=400) == 0
    resumed = (killed / "metrics.jsonl").read_bytes()
    assert resumed == (uninterrupted / "metrics.jsonl").read_bytes()
    assert len(losses(uninterrupted)) == 30


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """The loss curve of the debug config on one device."""
    workdir = tmp_path_factory.mktemp("one")
    assert start(workdir, devices=1).wait(timeout=400) == 0
    return losses(workdir)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=["data", "fsdp", "mixed"])
def test_loss_curve_does_not_depend_on_the_mesh(one_device, tmp_path, mesh):
    sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    loop.train(settings(**sizes), tmp_path)
    np.testing.assert_allclose(losses(tmp_path)[:20], one_device[:20], rtol=1e-5)


def test_accumulated_run_equals_run_on_full_batches(one_device, tmp_path):
    # Microbatches sample other dropout masks than the full batch, so dropout is off in both.
    image = dict(name="vit", variant="mu/16", pool="attention")
    no_dropout = {"model.image": image, "total.steps": 8}
    loop.train(settings(**no_dropout), tmp_path / "full")
    loop.train(settings(**no_dropout, accumulation=4), tmp_path / "micro")
    full, accumulated = losses(tmp_path / "full"), losses(tmp_path / "micro")
    np.testing.assert_allclose(accumulated, full, rtol=1e-5)
    assert not np.allclose(full, one_device[:8], rtol=1e-5), "dropout makes no difference"


def test_checkpoints_hold_no_frozen_parameter(tmp_path):
    loop.train(settings(**{"lock.image": True, "total.steps": 2}), tmp_path)
    saved = {p.name for p in (tmp_path / "checkpoints" / "2" / "state").rglob("*")}
    text = " ".join(saved) + (tmp_path / "checkpoints/2/state/_METADATA").read_text()
    assert "patch_embed" not in text and "token_embed" in text
    assert list((tmp_path / "frozen").iterdir())


def test_relative_workdir_works(tmp_path, monkeypatch):
    os.symlink(ROOT / "corpora", tmp_path / "corpora")
    monkeypatch.chdir(tmp_path)
    loop.train(settings(**{"total.steps": 1}), Path("runs/here"))
    assert checkpoint.saved_steps(tmp_path / "runs" / "here") == [1]


def test_resuming_with_another_config_is_an_error(tmp_path):
    loop.train(settings(**{"total.steps": 1}), tmp_path)
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.001 in the saved run, 0\.5 now"):
        loop.train(settings(**{"total.steps": 1, "optim.lr": 0.5}), tmp_path)
    loop.train(settings(**{"total.steps": 1, "log_every": 2}), tmp_path)  # a mutable key


def test_non_finite_loss_names_step_and_last_good_checkpoint(tmp_path, monkeypatch):
    """The features of the third batch are NaN."""
    batches = batch_source.BatchSource.batches

    def batches_with_nan(self, start):
        for t, batch in enumerate(batches(self, start), start):
            nan = jnp.full((64, 32), jnp.nan)
            yield batch if t < 2 else batch.replace(image=None, image_features=nan)

    monkeypatch.setattr(batch_source.BatchSource, "batches", batches_with_nan)
    changes = {"lock.image": True, "checkpoint.every.steps": 1}
    # Checkpoint 2 has the parameters that step 3 used, so the last good one is 1.
    with pytest.raises(NonFiniteLossError, match=r"loss is nan at step 3; .*checkpoints/1\."):
        loop.train(settings(**changes), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lock.patterns": (".*",)}, "nothing to train"),
        ({"batch_size": 60}, "microbatch size 60 does not divide over 8 devices"),
        ({"optim.name": "adma"}, "expected one of adamw"),
        ({"evals": dict(toy=dict(name="retreival"))}, "retreival"),
        ({"baselines": dict(toy=dict(name="retreival"))}, "retreival"),
        ({"objectives": dict(softmx=dict(weight=1.0))}, "softmx"),
    ],
)
def test_invalid_config_is_an_error_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        loop.train(settings(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metric_names(tmp_path):
    evals = {"toy": dict(name="retrieval", source=held_out_source(), caption_set="name")}
    loop.train(settings(**{"total.steps": 2, "evals": evals, "checkpoint.best_metric":
                         "val/toy/image_to_text_R@1"}), tmp_path)  # fmt: skip
    first, second, evaluated = metrics(tmp_path)
    assert {"train/loss", "train/lr", "train/logit_scale"} <= first.keys() & second.keys()
    assert {"val/toy/image_to_text_R@1", "val/toy/text_to_image_R@10"} <= evaluated.keys()
    (result,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert result["dataset"] == "toy" and "image_retrieval_recall@5" in result["metrics"]
    assert all(np.isfinite(v) for v in jax.tree.leaves(result["metrics"]))


def held_out_source():
    return dict(
        name="webdataset", path="corpora/emoji/heldout.tar", image=("google.webp",),
        captions=dict(name=("name", "en")), group=("concept",),
    )  # fmt: skip


def folder_with_bad_records(folder):
    """Save 40 records, four with an unreadable image and one without caption; return a source."""
    rng = np.random.default_rng(0)
    rows = ["filepath,title"]
    for i in range(40):
        pixels = rng.integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
        rows.append(f"{i}.jpg,{'' if i == 4 else f'image number {i}'}")
    encoded = (folder / "0.jpg").read_bytes()
    (folder / "0.jpg").write_bytes(encoded[: len(encoded) // 2])
    (folder / "1.jpg").write_bytes(b"no image at all")
    (folder / "2.jpg").unlink()
    Image.new("1", (20000, 10000)).save(folder / "3.png")
    (folder / "3.png").rename(folder / "3.jpg")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    return dict(name="folder", path=str(folder), table=str(folder / "pairs.csv"))


def test_bad_records_are_skipped_and_counted_up_to_the_cap(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    changes = {
        "data.source": folder_with_bad_records(tmp_path / "data"),
        "data.caption_weights": {"caption": 1.0},
        "batch_size": 40,
        "total.steps": 2,
        "data.max_bad_fraction": 0.2,
        "data.max_bad_fraction_after": 40,
    }
    with caplog.at_level("WARNING", logger="imgtune_jax.data"):
        loop.train(settings(**changes), tmp_path / "run")
    assert np.all(np.isfinite(losses(tmp_path / "run")))
    record = tmp_path / "run" / "checkpoints" / "2" / "record" / "metadata"
    counted = json.loads(record.read_text())["bad_records"]
    causes = {"truncated_image", "not_an_image", "missing_image", "too_many_pixels"}
    assert counted.keys() == causes | {"missing_caption", "seen"}
    assert all(counted[c] == counted["seen"] // 40 for c in causes)
    assert all(f"{i}.jpg" in caplog.text for i in range(5))
    changes["data.max_bad_fraction"] = 0.1
    with pytest.raises(TooManyBadRecordsError, match=r"5 of 40 records are bad \(12\.5%, allowed"):
        loop.train(settings(**changes), tmp_path / "capped")


def test_length_buckets_change_no_loss(tmp_path):
    """Length buckets are an error with a text tower that reads its padding."""
    image = dict(settings().model["image"], dropout=0.0)
    changes = {"model.image": image, "total.steps": 6, "data.caption_weights": {"name": 1.0}}
    buckets = {"data.length_buckets": (8, 10)}
    loop.train(settings(**changes), tmp_path / "full")
    loop.train(settings(**changes, **buckets), tmp_path / "buckets")
    np.testing.assert_allclose(losses(tmp_path / "buckets"), losses(tmp_path / "full"), rtol=1e-5)
    text = dict(settings().model["text"], mask_padding=False, causal=False)
    with pytest.raises(ValueError, match="a text tower that reads its padding"):
        loop.train(settings(**changes, **buckets, **{"model.text": text}), tmp_path / "error")


def test_frozen_kernels_in_bfloat16_change_no_metric(tmp_path, monkeypatch):
    """Metrics are equal bit for bit, since every product rounds the kernels to bfloat16."""
    changes = {"model.dtype": "bfloat16", "lock.image": True, "total.steps": 4}
    loop.train(settings(**changes), tmp_path / "bfloat16")
    monkeypatch.setattr(models.ImageTextModel, "cast_frozen_kernels", lambda self, frozen: frozen)
    loop.train(settings(**changes), tmp_path / "float32")
    rounded = (tmp_path / "bfloat16/metrics.jsonl").read_bytes()
    assert rounded == (tmp_path / "float32/metrics.jsonl").read_bytes()
