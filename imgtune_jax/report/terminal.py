"""The results table for a terminal."""

from __future__ import annotations

from pathlib import Path

from imgtune_jax.report.run_data import Table, read_run_data, result_tables

COUNTS = ("images", "texts", "broken")


def summary(workdir: str | Path) -> str:
    """All of a run's results as aligned text, baselines beside ours; the best is starred."""
    run = read_run_data(Path(workdir))
    return "\n\n".join(_table(t) for t in result_tables(run.results, model=run.name))


def _table(table: Table) -> str:
    shown = [i for i, name in enumerate(table.columns) if name not in COUNTS]
    header = ["data set", "model", *(_short(table.columns[i]) for i in shown)]
    rows = [header]
    for row in table.rows:
        cells = [row.cells[i] for i in shown]
        texts = ["" if c is None else f"{c.text}{'*' if c.best else ' '}" for c in cells]
        rows.append(["" if row.continues else row.dataset, row.model, *texts])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [_line(row, widths) for row in rows]
    rule = "-" * len(lines[0])
    return "\n".join([table.title, rule, lines[0], rule, *lines[1:], rule])


def _short(label: str) -> str:
    return label.replace("image → text", "i→t").replace("text → image", "t→i")


def _line(row: list[str], widths: list[int]) -> str:
    left = [f"{cell:<{w}}" for cell, w in zip(row[:2], widths[:2], strict=True)]
    right = [f"{cell:>{w}}" for cell, w in zip(row[2:], widths[2:], strict=True)]
    return "  ".join(left + right)
