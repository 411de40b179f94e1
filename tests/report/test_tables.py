from __future__ import annotations

from types import SimpleNamespace

import pytest

from imgtune_jax.evals.results import make_result
from imgtune_jax.report.run_data import read_run_data
from imgtune_jax.report.tables import MetricColumn, key_numbers, metric_label, result_tables


def test_table_has_the_newest_results_and_marks_the_best_of_a_data_set(workdir):
    (table,) = result_tables(read_run_data(workdir).results, model="lit")
    assert table.columns == ["image → text R@1", "image → text median rank", "images"]
    run, baseline = table.rows
    assert (run.model, run.is_run) == ("lit", True)
    assert (baseline.model, baseline.is_run) == ("ridge", False)
    assert [c.text for c in run.cells] == ["50.0", "4.5", "40"]
    assert [c.best for c in run.cells] == [True, False, False]
    assert [c.best for c in baseline.cells] == [False, True, False]  # a lower rank is better


def result(value, step, **changes):
    fields = dict(dataset="d", model="m", pretrained="", task="t", step=step)
    return make_result(**(fields | changes), metrics={"acc1": value})


def cells(tables):
    return [cell and cell.text for table in tables for row in table.rows for cell in row.cells]


def test_result_of_an_older_step_does_not_replace_a_newer_one():
    results = [result(0.1, 0, model="ridge"), result(0.3, 30), result(0.2, 20)]
    assert cells(result_tables(results, model="m")) == ["30.0", "10.0"]
    assert cells(result_tables(results, model="m", step=20)) == ["20.0", "10.0"]


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_value_that_is_not_finite_is_shown_as_such_and_never_the_best(bad):
    results = [result(0.3, 1), result(0.1, 0, model="ridge"), result(0.2, 0, model="other")]
    results[1]["metrics"] = {"acc1": bad, "loss": bad}  # older files may have NaN
    (table,) = result_tables(results, model="m")
    assert [[c and (c.text, c.best) for c in row.cells] for row in table.rows] == [
        [("30.0", True), None],
        [("not finite", False), ("not finite", False)],
        [("20.0", False), None],
    ]
    run = SimpleNamespace(last_step=None, series={})
    assert [n.note for n in key_numbers(run, [table])] == ["ridge: not finite"]


def test_repeated_captions_have_a_note_and_no_column():
    metrics = {"CIDEr": 0.1, "same_caption": 0.92, "same_reference": 0.1}
    records = [
        make_result(dataset=d, model="m", pretrained="", task="captioning", metrics=metrics | x)
        for d, x in {"a": {}, "b": {"same_caption": 0.2}}.items()
    ]
    (table,) = result_tables(records, model="m")
    assert table.columns == ["CIDEr"]
    assert table.notes == ["a (m): 92 % of the images have the same caption."]


def test_key_numbers_start_with_english_results():
    common = dict(model="m", pretrained="", task="captioning", metrics={"CIDEr": 0.5})
    records = [make_result(dataset=f"s_{x}", language=x, **common) for x in ("ar", "en", "zh")]
    run = SimpleNamespace(last_step=None, series={})
    numbers = key_numbers(run, result_tables(records, model="m"))
    assert [n.label for n in numbers] == ["s_en: CIDEr", "s_ar: CIDEr", "s_zh: CIDEr"]


def test_retrieval_metrics_have_readable_labels_and_signs():
    assert metric_label("image_retrieval_recall@5") == "text → image R@5"
    for name in ("image_to_text_R@1", "text_retrieval_recall@1"):
        assert metric_label(name) == "image → text R@1"
    assert MetricColumn("loss").sign == MetricColumn("text_retrieval_mean_rank").sign == -1
    assert MetricColumn("acc5").sign == 1 and MetricColumn("num_images").sign == 0


def test_caption_metrics_have_the_labels_formats_and_signs_of_papers():
    labels = [metric_label(name) for name in ("Bleu_4", "ROUGE_L", "exact_match")]
    assert labels == ["BLEU-4", "ROUGE-L", "exact match"]
    assert MetricColumn("CIDEr").format(1.4189) == "141.9"
    assert MetricColumn("chrF").format(61.234) == "61.2"
    assert MetricColumn("CIDEr").sign == MetricColumn("chrF").sign == 1
    assert MetricColumn("perplexity").sign == -1
