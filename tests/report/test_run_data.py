from __future__ import annotations

import pytest

from imgtune_jax.report.run_data import read_run_data


def test_incomplete_last_line_is_skipped_and_an_invalid_line_raises(workdir):
    path = workdir / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text + '{"step": 6, "train/lo')
    assert read_run_data(workdir).last_step == 5
    path.write_text("nonsense\n" + text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is not JSON: 'nonsense'"):
        read_run_data(workdir)


def test_values_that_are_not_finite_are_no_points_of_a_curve(workdir):
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/loss": NaN, "train/lr": null, "val/x": Infinity}\n')
    series = read_run_data(workdir).series
    assert [len(series[name]) for name in ("train/loss", "train/lr")] == [5, 5]
    assert "val/x" not in series
