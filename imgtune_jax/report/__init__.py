"""The report of a run, `report.html`: curves, results, and examples of retrieval and captions.

The page is one file that loads nothing from the network.
"""

from __future__ import annotations

from imgtune_jax.report.page import write_report, write_run_report
from imgtune_jax.report.retrieval_examples import RetrievalData
from imgtune_jax.report.terminal import check_evaluations, summary

__all__ = ["RetrievalData", "check_evaluations", "summary", "write_report", "write_run_report"]
