"""Plots, a web page and a terminal table from a run's result dictionary and arrays."""

from cliperase_fast.report.audit_html import audit_page
from cliperase_fast.report.comparison import comparison_page, comparison_table
from cliperase_fast.report.data import ReportData
from cliperase_fast.report.html import write_html
from cliperase_fast.report.ledger import ledger_page, ledger_table
from cliperase_fast.report.model_card import audit_advice, model_card
from cliperase_fast.report.plots import write_plots
from cliperase_fast.report.table import audit_table, class_table, text_table
from cliperase_fast.report.wording import Verdict, verdict

__all__ = [
    "ReportData",
    "Verdict",
    "audit_advice",
    "audit_page",
    "audit_table",
    "class_table",
    "comparison_page",
    "comparison_table",
    "ledger_page",
    "ledger_table",
    "model_card",
    "text_table",
    "verdict",
    "write_html",
    "write_plots",
]
