"""What a run has left in its folder, read for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgtune_jax.config import flatten_config
from imgtune_jax.evals.results import read_results

Series = list[tuple[int, float]]  # (step, value)


@dataclass(frozen=True)
class RunData:
    """A run's folder in memory; a part that is not there yet is empty."""

    name: str
    config: dict[str, Any]  # by dotted key
    series: dict[str, Series]
    results: list[dict[str, Any]]

    @property
    def last_step(self) -> int | None:
        """The newest step that anything is known of."""
        return max((points[-1][0] for points in self.series.values()), default=None)


def read_run_data(workdir: Path) -> RunData:
    """Read config.json, metrics.jsonl, timing.jsonl and results.jsonl of `workdir`.

    Raises FileNotFoundError if there is no such folder, ValueError for a line that is no JSON.
    """
    if not workdir.is_dir():
        raise FileNotFoundError(f"no run in {workdir}; wanted the folder that training wrote to")
    path = workdir / "config.json"
    config = json.loads(path.read_text("utf-8")) if path.exists() else {}
    lines = _read_lines(workdir / "metrics.jsonl") + _read_lines(workdir / "timing.jsonl")
    return RunData(
        name=str(config.get("name", workdir.resolve().name)),
        config=flatten_config(config) if config else {},
        series=_series(lines),
        results=read_results(workdir / "results.jsonl"),
    )


def _series(lines: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    by_name: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step":
                by_name.setdefault(name, {})[int(line["step"])] = float(value)
    return {name: sorted(points.items()) for name, points in by_name.items()}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = path.read_text("utf-8")
    lines = text.split("\n")
    # A run that is still writing, or was killed, may leave half a line at the end.
    complete = lines[:-1]
    records = []
    for number, line in enumerate(complete, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {line[:80]!r}") from error
    return records


# Parts of the names of metrics that are shown as percentages; so papers show captions' scores.
FRACTIONS = ("recall", "R@", "acc", "f1", "precision", "Bleu", "ROUGE", "METEOR", "CIDEr", "exact")


class MetricColumn:
    """How a metric is named, formatted and compared in a table."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.label = metric_label(metric)

    @property
    def sign(self) -> int:
        """1: more is better; -1: less is; 0: neither."""
        if self.metric.startswith("num_") or self.metric in ("l2", "best_lambda", "converged"):
            return 0
        less = "rank" in self.metric or not (self._is_fraction() or self.metric == "chrF")
        return -1 if less else 1

    def format(self, value: float) -> str:
        """A share as a percentage, as chrF is already; a count as an integer."""
        if self._is_fraction() or self.metric == "chrF":
            return f"{value if self.metric == 'chrF' else 100 * value:.1f}"
        return f"{value:,.0f}" if value == int(value) and abs(value) >= 1 else f"{value:.4g}"

    def _is_fraction(self) -> bool:
        return any(part in self.metric for part in FRACTIONS)


def metric_label(metric: str) -> str:
    """A metric's name in words: `image_retrieval_recall@5` is `text → image R@5`."""
    if metric == "lr":
        return "learning rate"
    words = {
        "text_retrieval_": "image → text ",
        "image_retrieval_": "text → image ",
        "image_to_text_": "image → text ",
        "text_to_image_": "text → image ",
        "recall@": "R@",
        "num_": "",
        "lp_": "",
        "Bleu_": "BLEU-",
        "ROUGE_L": "ROUGE-L",
        "acc1": "accuracy",
        "acc5": "top-5 accuracy",
        "f1": "F1",
        "logit_scale": "logit scale",
        "grad_norm": "gradient norm",
        "_": " ",
    }
    for old, new in words.items():
        metric = metric.replace(old, new)
    return metric


@dataclass(frozen=True)
class Cell:
    """One number of a table."""

    text: str
    best: bool


@dataclass(frozen=True)
class Row:
    """One result: ours, or a baseline's."""

    dataset: str
    model: str
    pretrained: str
    language: str
    ours: bool
    continues: bool  # the row above is of the same data
    cells: list[Cell | None]


@dataclass(frozen=True)
class Table:
    """The newest results of one task, data set by data set, the best of each in a column marked."""

    task: str
    columns: list[str]
    rows: list[Row]

    @property
    def title(self) -> str:
        """The task in words."""
        return self.task.replace("zeroshot", "zero-shot").replace("_", " ").capitalize()


def result_tables(results: Sequence[Mapping[str, Any]], *, model: str) -> list[Table]:
    """One table per task. Of several results of one model on one data set the last counts.

    Per-class and per-draw numbers (`f1/cat`, `5shot_acc1_seed0`) stay in `results.jsonl`.
    """
    newest: dict[tuple[str, str, str, str], Mapping[str, Any]] = {}
    for r in results:
        newest[r["task"], r["dataset"], r["language"], r["model"]] = r
    tasks = dict.fromkeys(task for task, *_ in newest)
    return [
        _table(task, [r for r in newest.values() if r["task"] == task], model=model)
        for task in tasks
    ]


def _table(task: str, results: Sequence[Mapping[str, Any]], *, model: str) -> Table:
    named = dict.fromkeys(name for r in results for name in r["metrics"] if "/" not in name)
    shown = [name for name in named if "mean_rank" not in name and "_seed" not in name]
    columns = [MetricColumn(name) for name in sorted(shown, key=_order)]
    places = list(dict.fromkeys((r["dataset"], r["language"]) for r in results))
    rows = []
    for dataset, language in places:
        here = [r for r in results if (r["dataset"], r["language"]) == (dataset, language)]
        for i, r in enumerate(sorted(here, key=lambda r: r["model"] != model)):
            rows.append(
                Row(
                    dataset=dataset,
                    model=r["model"] if r["model"] == model else r["model"].replace("_", " "),
                    pretrained=r["pretrained"],
                    language=language,
                    ours=r["model"] == model,
                    continues=i > 0,
                    cells=[_cell(column, r, here) for column in columns],
                )
            )
    return Table(task, [column.label for column in columns], rows)


def _cell(
    column: MetricColumn, result: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]]
) -> Cell | None:
    value = result["metrics"].get(column.metric)
    if value is None:
        return None
    values = [r["metrics"][column.metric] for r in rivals if column.metric in r["metrics"]]
    beaten = [v for v in values if column.sign * v < column.sign * value]
    return Cell(
        column.format(value),
        best=bool(beaten) and value == max(values, key=lambda v: column.sign * v),
    )


def _order(metric: str) -> tuple[int, int]:
    """Image → text first, then text → image, then the rest; recalls before ranks before sizes."""
    family = 0 if metric.startswith(("text_retrieval", "image_to_text")) else 1
    family = 2 if not metric.startswith(("text_", "image_")) else family
    kind = 3 if MetricColumn(metric).sign == 0 else 1 if "rank" in metric else 0
    return kind, family


@dataclass(frozen=True)
class KeyNumber:
    """A figure for the head of the page."""

    label: str
    value: str
    note: str = ""


def key_numbers(run: RunData, tables: Sequence[Table], *, limit: int = 8) -> list[KeyNumber]:
    """How far the run is, its loss, and on every data set its own R@1, accuracy or CIDEr.

    English, which results are in unless they say otherwise, comes before other languages.
    """
    numbers = [] if run.last_step is None else [KeyNumber("training steps", f"{run.last_step:,}")]
    if "train/loss" in run.series:
        numbers.append(KeyNumber("training loss", f"{run.series['train/loss'][-1][1]:.3g}"))
    for table in tables:
        heads = ("accuracy", "CIDEr", "exact match")
        chosen = [i for i, c in enumerate(table.columns) if c.endswith("R@1") or c in heads]
        for row in sorted(table.rows, key=lambda row: row.language != "en"):
            if row.ours:
                numbers += [_number(table, row, i) for i in chosen if row.cells[i]]
    return numbers[:limit]


def _number(table: Table, row: Row, column: int) -> KeyNumber:
    unit = "" if table.columns[column] == "CIDEr" else " %"

    def text(r: Row) -> str:
        cell = r.cells[column]
        return f"{cell.text}{unit}" if cell else "–"

    place = row.dataset, row.language
    rivals = [r for r in table.rows if not r.ours and (r.dataset, r.language) == place]
    note = ", ".join(f"{r.model}: {text(r)}" for r in rivals[:1])
    return KeyNumber(f"{row.dataset}: {table.columns[column]}", text(row), note)
