"""Result tables as plain text, for the terminal."""

from __future__ import annotations

from pathlib import Path

from imgtune_jax.errors import UserError
from imgtune_jax.report.run_data import read_run_data
from imgtune_jax.report.tables import Table, result_tables

HIDDEN_COLUMNS = ("images", "texts", "broken")


def summary(workdir: str | Path, *, step: int | None = None) -> str:
    """Return the results of a run and its baselines as aligned text; stars mark the best values.

    With `step`, the run's results are those at that step, and not the newest ones.
    """
    run = read_run_data(Path(workdir))
    tables = result_tables(run.results, model=run.name, step=step)
    return "\n\n".join(map(_format_table, tables))


def _format_table(table: Table) -> str:
    shown = [i for i, name in enumerate(table.columns) if name not in HIDDEN_COLUMNS]
    header = ["data set", "model", *(_abbreviate(table.columns[i]) for i in shown)]
    rows = [header]
    for row in table.rows:
        cells = [row.cells[i] for i in shown]
        texts = ["" if c is None else f"{c.text}{'*' if c.best else ' '}" for c in cells]
        rows.append(["" if row.continues else row.dataset, row.model, *texts])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [_format_row(row, widths) for row in rows]
    separator = "-" * len(lines[0])
    return "\n".join(
        [table.title, separator, lines[0], separator, *lines[1:], separator, *table.notes]
    )


def _abbreviate(label: str) -> str:
    return label.replace("image → text", "i→t").replace("text → image", "t→i")


def _format_row(row: list[str], widths: list[int]) -> str:
    left = [f"{cell:<{w}}" for cell, w in zip(row[:2], widths[:2], strict=True)]
    right = [f"{cell:>{w}}" for cell, w in zip(row[2:], widths[2:], strict=True)]
    return "  ".join(left + right)


def check_evaluations(workdir: str | Path) -> None:
    """Raise UserError that lists the evaluations of a run that failed, if there are any."""
    failures = read_run_data(Path(workdir)).failures
    if failures:
        lines = [
            f"{r['dataset']} ({r['model']}, {r['pretrained']}): {r['error']}" for r in failures
        ]
        raise UserError(
            f"the model is saved, but these evaluations failed and have no metrics; mend the cause "
            f"and run imgtune eval --workdir={workdir}:\n  " + "\n  ".join(lines)
        )
