"""The page that people look at: what an adapter changes in its base model, in one HTML file.

from florapeft.report import write_report
write_report("runs/digits", "report.html")
"""

from florapeft.report.page import write_report

__all__ = ["write_report"]
