"""One page per run, `report.html`: curves, results, and what the model really retrieves.

The page is one file that asks the network for nothing.
"""

from __future__ import annotations

from imgtune_jax.report.page import write_report, write_run_report
from imgtune_jax.report.retrieval_examples import RetrievalData
from imgtune_jax.report.terminal import summary

__all__ = ["RetrievalData", "summary", "write_report", "write_run_report"]
