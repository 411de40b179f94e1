from __future__ import annotations

import json

import pytest

from imgtune_jax.evals.results import append_result, evaluator_result, make_result, read_results
from imgtune_jax.evals.retrieval import Retrieval


def test_results_line_has_clip_benchmark_keys_in_order(tmp_path):
    record = evaluator_result(
        "emoji", Retrieval([], language="de"), {"text_retrieval_recall@1": 1}, model="lit", step=7
    )
    path = tmp_path / "results.jsonl"
    append_result(path, record)
    append_result(path, record)
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    got = json.loads(lines[0])
    assert list(got)[:6] == ["dataset", "model", "pretrained", "task", "metrics", "language"]
    assert got["task"] == "zeroshot_retrieval" and got["language"] == "de" and got["step"] == 7
    assert read_results(path) == [record, record]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_metric_that_is_not_finite_raises(bad):
    with pytest.raises(ValueError, match=r"not finite: {'acc5'"):
        make_result(
            dataset="d", model="m", pretrained="p", task="t", metrics={"acc5": bad, "acc1": 1.0}
        )


def test_missing_key_raises(tmp_path):
    with pytest.raises(ValueError, match=r"needs \['language'\]"):
        append_result(
            tmp_path / "r.jsonl",
            {"dataset": "d", "model": "m", "pretrained": "p", "task": "t", "metrics": {}},
        )


def test_missing_file_has_no_results(tmp_path):
    assert read_results(tmp_path / "results.jsonl") == []
