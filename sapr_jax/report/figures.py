"""Figures of runs: those of the supplement, and the progress of the alignment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sapr_jax.report.run_history import RunHistory

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart; the line styles help on paper without colours.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")
_GRAY = "#777777"


def accuracy_of_subnetwork(runs: Sequence[RunHistory]) -> Figure:
  """Accuracy of the masked network over the epochs of training (supplement C, Fig. 1a)."""
  figure, axes = _figure("Sub-network during training", "epoch", "test accuracy (%)")
  _lines(axes, runs, "subnetwork_accuracy", scale=100)
  return _finished(figure, axes, runs)


def accuracy_of_full_model(runs: Sequence[RunHistory]) -> Figure:
  """Accuracy of the dense network, and of the pruned one while it is fine-tuned (supplement C, Fig. 1b)."""
  figure, axes = _figure("Full model, then the pruned one", "epoch", "test accuracy (%)")
  _lines(axes, runs, "test_accuracy", scale=100)
  lengths = [(run.config["train.epochs"], run.records[-1]["step"]) for run in runs]
  for epochs in sorted({epochs for epochs, step in lengths if step > epochs}):
    axes.axvline(epochs + 0.5, color=_GRAY, linewidth=1)
    axes.annotate(" fine-tuning", (epochs + 0.5, 0.02), xycoords=("data", "axes fraction"), color=_GRAY, fontsize=9)
  return _finished(figure, axes, runs)


def hamming_distance(runs: Sequence[RunHistory]) -> Figure:
  """Share of channels that change between the architectures of consecutive epochs (supplement D, Fig. 2)."""
  figure, axes = _figure("Change of the architecture", "epoch", "Hamming distance to the epoch before")
  _lines(axes, runs, "hamming_distance")
  axes.axhline(0.05, color=_GRAY, linewidth=1)
  axes.annotate("0.05", (1.0, 0.05), xycoords=("axes fraction", "data"), color=_GRAY, fontsize=9, va="center")
  axes.set_ylim(bottom=0)
  return _finished(figure, axes, runs)


def budget(runs: Sequence[RunHistory]) -> Figure:
  """Share of the budget's cost: of the masks in force, and of the generator's samples."""
  figure, axes = _figure("Budget", "epoch", "share of the budget's cost (%)")
  _lines(axes, runs, "cost_share", scale=100)
  _lines(axes, runs, "generator_cost_share", scale=100, dotted=True)
  _explain_styles(axes, "masks in force", "sampled by the generator")
  for p in sorted({run.config["prune.p"] for run in runs if run.config.get("prune.limit") is None}):
    axes.axhline(100 * p, color=_GRAY, linewidth=1)
    axes.annotate(f"p = {p:g}", (1.0, 100 * p), xycoords=("axes fraction", "data"), color=_GRAY, fontsize=9)
  return _finished(figure, axes, runs)


def alignment(runs: Sequence[RunHistory]) -> Figure:
  """Mean norm of the channels that are kept and of those that are dropped."""
  figure, axes = _figure("Alignment: norms of the channels", "epoch", "mean norm of a channel's slice")
  _lines(axes, runs, "kept_norm_mean", dotted=True)
  _lines(axes, runs, "dropped_norm_mean")
  _explain_styles(axes, "dropped", "kept")
  axes.set_ylim(bottom=0)
  return _finished(figure, axes, runs)


def kept_channels(runs: Sequence[RunHistory]) -> Figure:
  """Channels that each group keeps, beside those of the dense network."""
  # The colours are those of the other figures.
  kept = [(run, _colour(i), widths) for i, run in enumerate(runs) if (widths := run.last("widths"))]
  groups = list(kept[0][2]) if kept else []
  drawn = [entry for entry in kept if list(entry[2]) == groups]
  title = "Kept channels" if len(drawn) == len(kept) else "Kept channels (without runs of other networks)"
  figure, axes = _figure(title, "", "channels", width=max(7.0, 0.24 * len(groups) + 2.5))
  dense: dict[str, int] = next((run.network["groups"] for run, *_ in drawn if run.network), {})
  if all(name in dense for name in groups):
    axes.bar(range(len(groups)), [dense[name] for name in groups], 0.9, color="#DDDDDD", label="dense")
  width = 0.8 / max(1, len(drawn))
  for i, (run, colour, widths) in enumerate(drawn):
    places = [x - 0.4 + (i + 0.5) * width for x in range(len(groups))]
    axes.bar(places, list(widths.values()), width, color=colour, label=run.label)
  axes.set_xticks(range(len(groups)), groups, rotation=90, fontsize=7)
  axes.margins(x=0.01)
  axes.grid(axis="x", visible=False)
  return _finished(figure, axes, [run for run, *_ in drawn], always=True)


FIGURES: Mapping[str, tuple[str, Callable[[Sequence[RunHistory]], Figure]]] = {
  "subnetwork_accuracy": ("subnetwork_accuracy", accuracy_of_subnetwork),
  "full_model_accuracy": ("test_accuracy", accuracy_of_full_model),
  "hamming_distance": ("hamming_distance", hamming_distance),
  "budget": ("cost_share", budget),
  "alignment": ("dropped_norm_mean", alignment),
  "kept_channels": ("widths", kept_channels),
}
"""File name -> (field that the records must have, function that draws the figure)."""


def _figure(title: str, x: str, y: str, width: float = 7.0) -> tuple[Figure, Axes]:
  from matplotlib.figure import Figure  # an extra, and slow to import

  figure = Figure(figsize=(width, 4.2), layout="constrained")
  axes = figure.add_subplot()
  axes.set(title=title, xlabel=x, ylabel=y)
  axes.grid(color="#E5E5E5", linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  return figure, axes


def _lines(axes: Axes, runs: Sequence[RunHistory], name: str, *, scale: float = 1, dotted: bool = False) -> None:
  from matplotlib.ticker import MaxNLocator

  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  for i, run in enumerate(runs):
    epochs, values = run.series(name)
    if not epochs:
      continue
    look: dict[str, Any] = {"color": _colour(i), "linestyle": _STYLES[i // len(_COLOURS) % len(_STYLES)]}
    if dotted:  # one entry in the legend is enough for a run
      look |= {"linestyle": (0, (1, 2)), "linewidth": 1.4}
    else:
      look["label"] = run.label
    marker = "o" if len(epochs) == 1 else None
    axes.plot(epochs, [scale * value for value in values], marker=marker, markersize=4, **look)


def _explain_styles(axes: Axes, solid: str, dotted: str) -> None:
  """Adds the meaning of solid and dotted lines to the legend, once for all runs."""
  axes.plot([], [], color=_GRAY, label=solid)
  axes.plot([], [], color=_GRAY, linestyle=(0, (1, 2)), linewidth=1.4, label=dotted)


def _finished(figure: Figure, axes: Axes, runs: Sequence[RunHistory], *, always: bool = False) -> Figure:
  """Adds the legend below the axes, where it covers no data."""
  handles, labels = axes.get_legend_handles_labels()
  if always or len(runs) > 1 or len(labels) > 1:
    # Width of an entry in inches: a line with its margins, and the letters.
    columns = max(1, int(figure.get_figwidth() / (0.7 + 0.08 * max(map(len, labels)))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
  return figure


def _colour(i: int) -> str:
  return _COLOURS[i % len(_COLOURS)]
