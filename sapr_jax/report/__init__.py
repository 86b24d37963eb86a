"""Tables and figures of recorded and measured numbers, and the page that shows them."""

from sapr_jax.report.figures import draw_figures
from sapr_jax.report.latency import compare_programs
from sapr_jax.report.page import PAGE, write_page
from sapr_jax.report.run_history import RunHistory, read_histories
from sapr_jax.report.text import (
  chance_warning,
  cost_in_words,
  format_epoch,
  format_summary,
  headlines,
  summary_as_html,
  versions,
)

__all__ = [
  "PAGE",
  "RunHistory",
  "chance_warning",
  "compare_programs",
  "cost_in_words",
  "draw_figures",
  "format_epoch",
  "format_summary",
  "headlines",
  "read_histories",
  "summary_as_html",
  "versions",
  "write_page",
]
