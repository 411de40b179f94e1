from __future__ import annotations

import json

import pytest

from imgtune_jax.evals.results import (
    append_result,
    evaluator_result,
    make_result,
    newest_results,
    read_results,
)
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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_metric_that_is_not_finite_is_null_and_logged(tmp_path, caplog, bad):
    metrics = {"acc5": bad, "acc1": 1.0}
    fields = dict(dataset="d", model="m", pretrained="p", task="t")
    path = tmp_path / "results.jsonl"
    append_result(path, make_result(**fields, metrics=metrics))
    assert "metrics of d are not finite: {'acc5'" in caplog.text
    (line,) = path.read_text().splitlines()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["metrics"] == {"acc5": None, "acc1": 1.0}
    with pytest.raises(ValueError, match="the result of d has a NaN or an infinity"):
        append_result(path, {**make_result(**fields, metrics={}), "metrics": metrics})
    assert len(read_results(path)) == 1


def test_newest_result_is_the_last_one_of_the_highest_step():
    def result(step, value, **changes):
        fields = dict(dataset="d", model="m", pretrained="p", task="t", metrics={"acc1": value})
        return make_result(**(fields | changes), **({} if step is None else {"step": step}))

    results = [
        result(None, 0.1),
        result(30, 0.2),
        result(30, 0.3),
        result(10, 0.4),
        result(0, 0.5, model="ridge"),
        result(0, 0.6, task="other"),
    ]
    assert [r["metrics"]["acc1"] for r in newest_results(results)] == [0.3, 0.5, 0.6]


def test_line_separator_in_a_name_does_not_end_a_result(tmp_path):
    path = tmp_path / "results.jsonl"
    record = make_result(dataset="a\u2028b\x85", model="m", pretrained="p", task="t", metrics={})
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", "utf-8")
    assert read_results(path) == [record]


def test_missing_key_raises(tmp_path):
    with pytest.raises(ValueError, match=r"needs \['language'\]"):
        append_result(
            tmp_path / "r.jsonl",
            {"dataset": "d", "model": "m", "pretrained": "p", "task": "t", "metrics": {}},
        )


def test_missing_file_has_no_results(tmp_path):
    assert read_results(tmp_path / "results.jsonl") == []
