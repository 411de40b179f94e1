"""Result tables, one per task, and the key numbers at the top of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from imgtune_jax import evals
from imgtune_jax.evals.captioning import is_repetitive
from imgtune_jax.report.run_data import RunData

NOT_FINITE = "not finite"
# The note below a table states these.
HIDDEN_METRICS = ("same_caption", "same_reference")


class MetricColumn:
    """Label and number format of a metric in a table, and whether higher is better."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.label = metric_label(metric)

    @property
    def sign(self) -> int:
        """1 if higher is better, -1 if lower is better, 0 for counts and settings."""
        return evals.metric_sign(self.metric)

    def format(self, value: float | None) -> str:
        """Format fractions in percent, chrF (0 to 100) like a percentage, and integers as such."""
        if not _is_finite(value):
            return NOT_FINITE
        if evals.is_fraction(self.metric) or self.metric == "chrF":
            return f"{value if self.metric == 'chrF' else 100 * value:.1f}"
        return f"{value:,.0f}" if value == int(value) and abs(value) >= 1 else f"{value:.4g}"


def _is_finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def metric_label(metric: str) -> str:
    """Return a readable name: `text → image R@5` for `image_retrieval_recall@5`."""
    if metric == "lr":
        return "learning rate"
    replacements = {
        "text_retrieval_": "image → text ",
        "image_retrieval_": "text → image ",
        "image_to_text_": "image → text ",
        "text_to_image_": "text → image ",
        "recall@": "R@",
        "num_": "",
        "lp_": "",  # linear probe
        "Bleu_": "BLEU-",
        "ROUGE_L": "ROUGE-L",
        "acc1": "accuracy",
        "acc5": "top-5 accuracy",
        "f1": "F1",
        "logit_scale": "logit scale",
        "grad_norm": "gradient norm",
        "_": " ",
    }
    for old, new in replacements.items():
        metric = metric.replace(old, new)
    return metric


@dataclass(frozen=True)
class Cell:
    """One number of a table."""

    text: str
    best: bool


@dataclass(frozen=True)
class Row:
    """One result, of the run or of a baseline."""

    dataset: str
    model: str
    pretrained: str
    language: str
    is_run: bool  # False: a baseline
    continues: bool  # the previous row has the same data set
    cells: list[Cell | None]


@dataclass(frozen=True)
class Table:
    """The newest results of one task, grouped by data set; the best values are marked.

    `notes` are sentences that warn of a result.
    """

    task: str
    columns: list[str]
    rows: list[Row]
    notes: list[str]

    @property
    def title(self) -> str:
        """The task as a heading, such as `Zero-shot retrieval`."""
        return self.task.replace("zeroshot", "zero-shot").replace("_", " ").capitalize()


def result_tables(
    results: Sequence[Mapping[str, Any]], *, model: str, step: int | None = None
) -> list[Table]:
    """Return one table per task, with the newest result of each model on each data set.

    `model` is the run's name; all other models are baselines. With `step`, the table has the run's
    results at that step. Mean ranks and metrics per class and per sample (`5shot_acc1_seed0`) are
    omitted; `results.jsonl` has them.
    """
    chosen = [r for r in results if step is None or r["model"] != model or r.get("step") == step]
    newest = evals.newest_results(chosen)
    tasks = dict.fromkeys(r["task"] for r in newest)
    return [
        _task_table(task, [r for r in newest if r["task"] == task], model=model) for task in tasks
    ]


def _task_table(task: str, results: Sequence[Mapping[str, Any]], *, model: str) -> Table:
    names = dict.fromkeys(name for r in results for name in evals.split_per_class(r["metrics"])[0])
    shown = [name for name in names if _is_shown(name)]
    columns = [MetricColumn(name) for name in sorted(shown, key=_column_order)]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["dataset"], result["language"]), []).append(result)
    rows = []
    for (dataset, language), group in groups.items():
        for i, result in enumerate(sorted(group, key=lambda r: r["model"] != model)):
            is_run = result["model"] == model
            rows.append(
                Row(
                    dataset=dataset,
                    model=model if is_run else result["model"].replace("_", " "),
                    pretrained=result["pretrained"],
                    language=language,
                    is_run=is_run,
                    continues=i > 0,
                    cells=[_cell(column, result, group) for column in columns],
                )
            )
    notes = [_repetition_note(result) for result in results if is_repetitive(result["metrics"])]
    return Table(task, [column.label for column in columns], rows, notes)


def _is_shown(metric: str) -> bool:
    return not (
        metric in HIDDEN_METRICS or "mean_rank" in metric or "_seed" in metric or "/" in metric
    )


def _repetition_note(result: Mapping[str, Any]) -> str:
    share = 100 * result["metrics"]["same_caption"]
    name = f"{result['dataset']} ({result['model']})"
    return f"{name}: {share:.0f} % of the images have the same caption."


def _cell(
    column: MetricColumn, result: Mapping[str, Any], group: Sequence[Mapping[str, Any]]
) -> Cell | None:
    """Return the cell of a result, marked if it is the best of `group` and another one is worse.

    `group` has all results on the same data set.
    """
    if column.metric not in result["metrics"]:
        return None
    value = result["metrics"][column.metric]
    if not _is_finite(value):
        return Cell(NOT_FINITE, best=False)
    values = [x for r in group if _is_finite(x := r["metrics"].get(column.metric))]
    has_worse = any(column.sign * v < column.sign * value for v in values)
    best = has_worse and value == max(values, key=lambda v: column.sign * v)
    return Cell(column.format(value), best)


def _column_order(metric: str) -> tuple[int, int]:
    """Return a sort key: first scores, then ranks, then counts and settings.

    In each kind, the order is image → text, text → image, other metrics.
    """
    direction = 0 if metric.startswith(("text_retrieval", "image_to_text")) else 1
    direction = 2 if not metric.startswith(("text_", "image_")) else direction
    kind = 3 if MetricColumn(metric).sign == 0 else 1 if "rank" in metric else 0
    return kind, direction


@dataclass(frozen=True)
class KeyNumber:
    """A number at the top of the page; `note` is the value of a baseline."""

    label: str
    value: str
    note: str = ""


def key_numbers(run: RunData, tables: Sequence[Table], *, limit: int = 8) -> list[KeyNumber]:
    """Return at most `limit` numbers: steps, training loss, and the run's main results.

    The main results are R@1, accuracy, CIDEr and exact match on each data set. English results come
    before those in other languages.
    """
    numbers = [] if run.last_step is None else [KeyNumber("training steps", f"{run.last_step:,}")]
    if "train/loss" in run.series:
        numbers.append(KeyNumber("training loss", f"{run.series['train/loss'][-1][1]:.3g}"))
    for table in tables:
        key_metrics = ("accuracy", "CIDEr", "exact match")
        columns = [i for i, c in enumerate(table.columns) if c.endswith("R@1") or c in key_metrics]
        for row in sorted(table.rows, key=lambda row: row.language != "en"):
            if row.is_run:
                numbers += [_key_number(table, row, i) for i in columns if row.cells[i]]
    return numbers[:limit]


def _key_number(table: Table, row: Row, column: int) -> KeyNumber:
    def format_cell(r: Row) -> str:
        cell = r.cells[column]
        if cell is None:
            return "–"
        has_unit = table.columns[column] != "CIDEr" and cell.text != NOT_FINITE
        return f"{cell.text} %" if has_unit else cell.text

    dataset_and_language = row.dataset, row.language
    baselines = [
        r for r in table.rows if not r.is_run and (r.dataset, r.language) == dataset_and_language
    ]
    note = ", ".join(f"{r.model}: {format_cell(r)}" for r in baselines[:1])
    return KeyNumber(f"{row.dataset}: {table.columns[column]}", format_cell(row), note)
