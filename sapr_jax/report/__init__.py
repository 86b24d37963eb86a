"""Tables of recorded and measured numbers."""

from sapr_jax.report.latency import measure_latency
from sapr_jax.report.text import chance_warning, cost_in_words, format_epoch, format_summary, versions

__all__ = ["chance_warning", "cost_in_words", "format_epoch", "format_summary", "measure_latency", "versions"]
