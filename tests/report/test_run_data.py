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
