"""A workdir with metrics and results, for the tests of the report."""

from __future__ import annotations

import json

import pytest

from imgtune_jax.evals.results import append_result, make_result
from tests.report.toy_report import UNSAFE


@pytest.fixture
def workdir(tmp_path):
    """Write the files of a run `lit`: five steps, and on data set S two results and a baseline."""
    (tmp_path / "config.json").write_text(
        json.dumps({"name": "lit", "optim": {"lr": 0.1}, "text": UNSAFE})
    )
    lines = [
        {"step": s, "train/loss": 3.0 / s, "train/lr": 0.1, "val/S/text_retrieval_recall@1": s / 9}
        for s in range(1, 6)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for model, value in (("lit", 0.25), ("lit", 0.5), ("ridge", 0.3125)):
        metrics = {
            "text_retrieval_recall@1": value,
            "text_retrieval_median_rank": 9 * value,
            "num_images": 40.0,
            "f1/cat": 0.5,
        }
        record = make_result(
            dataset="S", model=model, pretrained="p", task="zeroshot_retrieval", metrics=metrics
        )
        append_result(tmp_path / "results.jsonl", record)
    return tmp_path
