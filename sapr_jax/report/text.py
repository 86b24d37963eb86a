"""A run in words: a line for each epoch, and the table at the end."""

from __future__ import annotations

import html
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from sapr_jax.version import __version__

_NETWORKS = {
  "dense": "dense",
  "subnetwork": "sub-network, before fine-tuning",
  "pruned": "pruned, after fine-tuning",
}
_NOT_TUNED = {"dense": "dense", "pruned": "pruned"}
_COSTS = {
  "prunable_macs": "the prunable MACs",
  "macs": "the network's MACs",
  "params": "the parameters",
  "latency": "the latency",
  "latency_ms": "the latency",
}

_LEARNED = 0.5
"""Share of a ranking that must be learned for it not to count as noise."""


def cost_in_words(name: str) -> str:
  """Returns the name of a cost as a reader expects it: `prunable_macs` -> "the prunable MACs"."""
  return _COSTS.get(name, name)


def format_epoch(record: Mapping[str, Any], epochs: int) -> str:
  """Returns one line about the epoch of `record`, and a warning if its masks were not learned."""
  parts = [f"loss {record['train_loss']:.4f}"]
  if "test_accuracy" in record:
    parts.append(f"test accuracy {record['test_accuracy']:.2%}")
  if "subnetwork_accuracy" in record:
    parts[-1] += f" ({record['subnetwork_accuracy']:.2%} if cut now)"
  if record.get("kept_norm_mean") and "dropped_norm_mean" in record:
    parts.append(f"dropped channels shrunk to {record['dropped_norm_mean'] / record['kept_norm_mean']:.0%}")
  if "hamming_distance" in record:
    parts.append(f"choice changed {record['hamming_distance']:.1%}")
  parts.append(f"{record['weight_seconds'] + record.get('generator_seconds', 0.0):.1f} s")
  line = f"{record['stage']} {record['epoch']}/{epochs}: {', '.join(parts)}"
  if "widths" in record and record.get("generator_learned", 1.0) < _LEARNED:
    line = (
      f"warning: the choice of channels is still mostly that of a random start ({record['generator_learned']:.0%}"
      " learned): search longer (search.start_epoch, generator.data_share), learn faster (generator.learning_rate), or"
      f" start from an importance (generator.prior=l2_norm).\n{line}"
    )
  return line


def format_summary(summary: Mapping[str, Any]) -> str:
  """Returns the table of a finished run: accuracy, MACs, parameters, latency."""
  batch_sizes = list(summary["dense"].get("latency_ms", ()))
  rows = [summary_header(batch_sizes), *summary_rows(summary, batch_sizes)]
  widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
  lines = [
    "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
    for row in rows
  ]
  lines.insert(1, "-" * len(lines[0]))
  return "\n".join(lines)


def summary_header(batch_sizes: Sequence[str]) -> list[str]:
  """Returns the names of the columns of `summary_rows`."""
  latency = [name for batch in batch_sizes for name in (f"ms, batch {batch}", "speed-up")]
  return ["network", "accuracy", "MACs", "of dense", "parameters", *latency]


def summary_rows(summary: Mapping[str, Any], batch_sizes: Sequence[str]) -> list[list[str]]:
  """Returns a row for each network that a finished run measured; cells without a measurement are empty."""
  rows = []
  was_tuned = summary.get("run", {}).get("finetune_epochs", 1) > 0
  for name, title in (_NETWORKS if was_tuned else _NOT_TUNED).items():
    entry = summary.get(name, {})
    if "accuracy" not in entry:
      continue
    latency = []
    for batch in batch_sizes:
      ms, dense_ms = (of.get("latency_ms", {}).get(batch) for of in (entry, summary["dense"]))
      latency += ["" if ms is None else f"{ms:.2f}", f"{dense_ms / ms:.2f}x" if ms and dense_ms else ""]
    rows.append(
      [
        title,
        f"{entry['accuracy']:.2%}",
        f"{entry['macs'] / 1e6:,.3f} M",
        f"{entry['macs'] / summary['dense']['macs']:.1%}",
        f"{entry['params']:,}" if "params" in entry else "",
        *latency,
      ]
    )
  return rows


def headlines(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
  """Returns what a finished run achieved, as (number, what it is, details)."""
  dense, pruned = summary["dense"], summary["pruned"]
  lines = [
    (
      f"{pruned['macs'] / dense['macs']:.1%}",
      "of the MACs are left",
      f"{dense['macs'] / 1e6:,.3f} M → {pruned['macs'] / 1e6:,.3f} M for an image",
    )
  ]
  if "accuracy" in dense:
    change = f"{100 * (pruned['accuracy'] - dense['accuracy']):+.2f} points"
    details = f"{dense['accuracy']:.2%} → {pruned['accuracy']:.2%}, {change}"
  else:
    details = "of the pruned network"
  lines.append((f"{pruned['accuracy']:.2%}", "accuracy", details))
  if "params" in dense and "params" in pruned:
    share = f"{pruned['params'] / dense['params']:.1%}"
    lines.append((share, "of the parameters are left", f"{dense['params']:,} → {pruned['params']:,}"))
  for batch, before in dense.get("latency_ms", {}).items():
    if before and (after := pruned.get("latency_ms", {}).get(batch)):
      images = "1 image at a time" if batch == "1" else f"{batch} images at a time"
      lines.append((f"{before / after:.2f}×", f"as fast, {images}", f"{before:.2f} ms → {after:.2f} ms"))  # noqa: RUF001
  return lines


def summary_as_html(summary: Mapping[str, Any], caption: str) -> str:
  """Returns the table of `format_summary` in HTML, for a notebook."""
  batch_sizes = list(summary["dense"].get("latency_ms", ()))

  def row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

  head = row(summary_header(batch_sizes), "th")
  body = "".join(row(cells, "td") for cells in summary_rows(summary, batch_sizes))
  return f"<table><caption>{html.escape(caption)}</caption><thead>{head}</thead><tbody>{body}</tbody></table>"


def chance_warning(summary: Mapping[str, Any], num_classes: int) -> str | None:
  """Returns a warning if the pruned network does no better than guessing, None otherwise."""
  accuracy = summary["pruned"]["accuracy"]
  if accuracy > 1.5 / num_classes:
    return None
  dense = summary["dense"]["accuracy"]
  return (
    f"warning: the pruned network is right on {accuracy:.2%} of the test images, which is chance for {num_classes}"
    f" classes; the dense one is on {dense:.2%}. Train for longer, or keep more by a larger prune.p."
  )


def versions() -> dict[str, str]:
  """Returns the versions of the packages that the numbers depend on."""
  own = {"sapr_jax": __version__, "python": platform.python_version()}
  return own | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
