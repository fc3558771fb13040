"""Plots, a web page and a terminal table made from a run's result dictionary and arrays, and from nothing
else."""

from cliperase_fast.report.data import ReportData
from cliperase_fast.report.html import write_html
from cliperase_fast.report.plots import write_plots
from cliperase_fast.report.table import text_table
from cliperase_fast.report.wording import verdict

__all__ = ["ReportData", "text_table", "verdict", "write_html", "write_plots"]
