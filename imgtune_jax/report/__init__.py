"""One page per run, `report.html`: curves, results, and what the model really retrieves.

The page is one file that asks the network for nothing.
"""

from __future__ import annotations

from imgtune_jax.report.gallery import Gallery
from imgtune_jax.report.page import report_run, write_report
from imgtune_jax.report.text import summary

__all__ = ["Gallery", "report_run", "summary", "write_report"]
