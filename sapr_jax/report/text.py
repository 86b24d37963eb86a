"""A run in words: a line for each epoch, and the table at the end."""

from __future__ import annotations

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
_COSTS = {"prunable_macs": "the prunable MACs", "macs": "the network's MACs", "params": "the parameters"}

_LEARNED = 0.5
"""Share of a ranking that must be learned for it not to count as noise."""


def cost_in_words(name: str) -> str:
  """Returns the name of a cost as a reader expects it: `prunable_macs` -> "the prunable MACs"."""
  return _COSTS.get(name, name)


def format_epoch(record: Mapping[str, Any], epochs: int) -> str:
  """Returns one line about the epoch of `record`, and a warning if its masks were not learned."""
  parts = [f"loss {record['train_loss']:.4f}"]
  if "test_accuracy" in record:
    parts.append(f"test {record['test_accuracy']:.2%}")
  if "subnetwork_accuracy" in record:
    share = f"{record['cost_share']:.1%} of {cost_in_words(record['cost'])}"
    parts[-1] += f" (sub-network {record['subnetwork_accuracy']:.2%} at {share})"
  if "dropped_norm_mean" in record:
    parts.append(f"norms {record['kept_norm_mean']:.3f} kept, {record['dropped_norm_mean']:.3f} dropped")
  if "hamming_distance" in record:
    parts.append(f"Hamming {record['hamming_distance']:.3f}")
  parts.append(f"{record['weight_seconds']:.1f} s")
  if "generator_seconds" in record:
    parts[-1] += f" + generator {record['generator_seconds']:.1f} s"
  line = f"{record['stage']} {record['epoch']}/{epochs}: {', '.join(parts)}"
  if "widths" in record and record.get("generator_learned", 1.0) < _LEARNED:
    line = (
      f"warning: the generator's ranking is still mostly that of its random start ({record['generator_learned']:.0%}"
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
  return ["network", "accuracy", "MACs", "of dense", "parameters", *(f"ms, batch {b}" for b in batch_sizes)]


def summary_rows(summary: Mapping[str, Any], batch_sizes: Sequence[str]) -> list[list[str]]:
  """Returns a row for each network that a finished run measured; cells without a measurement are empty."""
  rows = []
  for name, title in _NETWORKS.items():
    entry = summary.get(name, {})
    if "accuracy" not in entry:
      continue
    latency = [entry.get("latency_ms", {}).get(batch) for batch in batch_sizes]
    rows.append(
      [
        title,
        f"{entry['accuracy']:.2%}",
        f"{entry['macs'] / 1e6:,.3f} M",
        f"{entry['macs'] / summary['dense']['macs']:.1%}",
        f"{entry['params']:,}" if "params" in entry else "",
        *("" if ms is None else f"{ms:.2f}" for ms in latency),
      ]
    )
  return rows


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
