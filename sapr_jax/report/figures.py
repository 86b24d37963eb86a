"""Figures of runs: those of the supplement, and the progress of the alignment."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sapr_jax.errors import needs_extra
from sapr_jax.report.run_history import RunHistory

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure as MatplotlibFigure

# Okabe and Ito's colours, which the colour-blind can tell apart; the line styles help on paper without colours.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_STYLES = ("-", "--", "-.", ":")
_DOTTED: dict[str, Any] = {"linestyle": (0, (1, 2)), "linewidth": 1.4}
_INK, _GRAY, _GRID, _BAR = "#333333", "#777777", "#e5e5e5", "#dddddd"
_WIDTH, _HEIGHT = 5.2, 3.3
"""Inches: letters can be read on a phone, whose window is as wide, and are not large on a desk."""


def accuracy_of_subnetwork(runs: Sequence[RunHistory]) -> MatplotlibFigure:
  """Accuracy of the masked network over the epochs of training (supplement C, Fig. 1a)."""
  figure, axes = _figure("Accuracy if it were cut now", "epoch", "test accuracy (%)")
  _lines(axes, runs, "subnetwork_accuracy", scale=100)
  return _finished(figure, axes)


def accuracy_of_full_model(runs: Sequence[RunHistory]) -> MatplotlibFigure:
  """Accuracy of the dense network, and of the pruned one while it is fine-tuned (supplement C, Fig. 1b)."""
  figure, axes = _figure("Accuracy of the whole network, then of the pruned one", "epoch", "test accuracy (%)")
  _lines(axes, runs, "test_accuracy", scale=100)
  lengths = [(run.config["train.epochs"], run.records[-1]["step"]) for run in runs]
  for epochs in sorted({epochs for epochs, step in lengths if step > epochs}):
    axes.axvline(epochs + 0.5, color=_GRAY, linewidth=1)
    _note(axes, "pruned", (epochs + 0.5, 0.03), ("data", "axes fraction"))
  return _finished(figure, axes)


def hamming_distance(runs: Sequence[RunHistory]) -> MatplotlibFigure:
  """Share of channels that change between the architectures of consecutive epochs (supplement D, Fig. 2)."""
  figure, axes = _figure("How much the choice of channels changes", "epoch", "channels that changed (%)")
  _lines(axes, runs, "hamming_distance", scale=100)
  axes.axhline(5, color=_GRAY, linewidth=1)
  _note(axes, "5 %", (1.0, 5), ("axes fraction", "data"), va="center")
  axes.set_ylim(bottom=0)
  return _finished(figure, axes)


def budget(runs: Sequence[RunHistory]) -> MatplotlibFigure:
  """Share of the budget's cost: of the masks in force, and of the generator's samples."""
  figure, axes = _figure("Cost of the chosen channels", "epoch", "share of the cost (%)")
  _lines(axes, runs, "cost_share", scale=100)
  _lines(axes, runs, "generator_cost_share", scale=100, dotted=True)
  _explain_styles(axes, runs, {"cost_share": "chosen"}, {"generator_cost_share": "the generator's random samples"})
  for p in sorted({run.config["prune.p"] for run in runs if run.config.get("prune.limit") is None}):
    axes.axhline(100 * p, color=_GRAY, linewidth=1)
    _note(axes, f"p = {p:g}", (1.0, 100 * p), ("axes fraction", "data"), va="center")
  return _finished(figure, axes)


def alignment(runs: Sequence[RunHistory]) -> MatplotlibFigure:
  """Mean norm of the channels that are kept and of those that are dropped."""
  figure, axes = _figure("Size of the weights of a channel", "epoch", "mean norm")
  _lines(axes, runs, "kept_norm_mean", dotted=True)
  _lines(axes, runs, "dropped_norm_mean")
  _explain_styles(axes, runs, {"dropped_norm_mean": "dropped"}, {"kept_norm_mean": "kept"})
  axes.set_ylim(bottom=0)
  return _finished(figure, axes)


def kept_channels(runs: Sequence[RunHistory]) -> MatplotlibFigure:
  """Channels that each group keeps, beside those of the dense network."""
  # The colours are those of the other figures.
  kept = [(run, _colour(i), widths) for i, run in enumerate(runs) if (widths := run.last("widths"))]
  groups = list(kept[0][2]) if kept else []
  drawn = [entry for entry in kept if list(entry[2]) == groups]
  title = "Kept channels" if len(drawn) == len(kept) else "Kept channels (without runs of other networks)"
  figure, axes = _figure(title, "", "channels", width=max(_WIDTH, 0.24 * len(groups) + 1.5))
  dense: dict[str, int] = next((run.network["groups"] for run, *_ in drawn if run.network), {})
  if all(name in dense for name in groups):
    axes.bar(range(len(groups)), [dense[name] for name in groups], 0.9, color=_BAR, label="dense")
  width = 0.8 / max(1, len(drawn))
  for i, (run, colour, widths) in enumerate(drawn):
    places = [x - 0.4 + (i + 0.5) * width for x in range(len(groups))]
    axes.bar(places, list(widths.values()), width, color=colour, label=run.label if len(runs) > 1 else "kept")
  fits = 0.06 * sum(len(name) + 2 for name in groups) < figure.get_figwidth() - 1
  axes.set_xticks(range(len(groups)), groups, rotation=0 if fits else 90, fontsize=8 if fits else 7)
  axes.margins(x=0.01)
  axes.grid(axis="x", visible=False)
  return _finished(figure, axes)


@dataclasses.dataclass(frozen=True)
class Drawing:
  """A figure of the report.

  Attributes:
    field: What the records must have.
    draw: Draws it for some runs.
    caption: What one sees, and what to look for.
  """

  field: str
  draw: Callable[[Sequence[RunHistory]], MatplotlibFigure]
  caption: str


FIGURES: Mapping[str, Drawing] = {
  "full_model_accuracy": Drawing(
    "test_accuracy",
    accuracy_of_full_model,
    "Up to the vertical line the whole network trains; behind it, only the pruned one is left and is fine-tuned. It"
    " should end about as high as the whole network did.",
  ),
  "subnetwork_accuracy": Drawing(
    "subnetwork_accuracy",
    accuracy_of_subnetwork,
    "Accuracy with the dropped channels taken out at once, and nothing repaired. It starts low and should climb to that"
    " of the whole network: then the cut itself costs nothing.",
  ),
  "alignment": Drawing(
    "dropped_norm_mean",
    alignment,
    "The weights of dropped channels are pushed towards zero. They should end near zero while those of kept channels"
    " stay large: then nothing in the network needs what is cut.",
  ),
  "hamming_distance": Drawing(
    "hamming_distance",
    hamming_distance,
    "Share of all channels for which keep or drop was decided otherwise than an epoch before. It should fall below 5 %"
    " and on towards zero: the choice has settled.",
  ),
  "budget": Drawing(
    "cost_share",
    budget,
    "What the chosen channels cost, as a share of what could be cut: always just within the budget. The random samples"
    " from which the generator learns should come down to the same level.",
  ),
  "kept_channels": Drawing(
    "widths",
    kept_channels,
    "How many channels are left in each group of layers, in front of what the dense network has. Short bars are where"
    " the network could do with less.",
  ),
}
"""File name -> the figure, in the order of the page."""


class Figures(dict[str, Any]):
  """Name -> figure. A notebook shows all of them."""

  def _repr_html_(self) -> str:
    look = "display: inline-block; background: #fff"  # a notebook may be dark
    return "".join(f'<div style="{look}">{as_svg(figure)}</div>' for figure in self.values())


def draw_figures(runs: Sequence[RunHistory]) -> dict[str, MatplotlibFigure]:
  """Draws those of `FIGURES` for which the runs have records; a notebook shows what is returned.

  Raises:
    InputError: If matplotlib is not installed.
  """
  with needs_extra("A figure", "report"):
    import matplotlib  # noqa: F401
  has = {name: any(run.last(drawing.field) is not None for run in runs) for name, drawing in FIGURES.items()}
  return Figures({name: drawing.draw(runs) for name, drawing in FIGURES.items() if has[name]})


def as_svg(figure: MatplotlibFigure) -> str:
  """Returns a figure as an SVG element, with letters as text."""
  import matplotlib

  buffer = io.StringIO()
  with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
  text = buffer.getvalue()
  return text[text.index("<svg") :]


def _figure(title: str, x: str, y: str, width: float = _WIDTH) -> tuple[MatplotlibFigure, Axes]:
  from sapr_jax.report.shown_figure import ShownFigure  # matplotlib is an extra, and slow to import

  figure = ShownFigure(figsize=(width, _HEIGHT), layout="constrained")
  axes = figure.add_subplot()
  axes.set_title(title, color=_INK, fontsize=10, loc="left", fontweight="bold")
  axes.set_xlabel(x, color=_INK, fontsize=9)
  axes.set_ylabel(y, color=_INK, fontsize=9)
  axes.tick_params(color=_GRAY, labelcolor=_INK, labelsize=8)
  axes.grid(color=_GRID, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.spines[["left", "bottom"]].set_color(_GRAY)
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
      look |= _DOTTED
    elif len(runs) > 1:
      look["label"] = run.label
    marker = "o" if len(epochs) == 1 else None
    axes.plot(epochs, [scale * value for value in values], marker=marker, markersize=4, **look)


def _note(axes: Axes, text: str, place: tuple[float, float], units: tuple[str, str], **look: Any) -> None:
  """Writes a few letters to the right of a place."""
  look |= {"color": _GRAY, "fontsize": 8}
  axes.annotate(text, place, xycoords=units, xytext=(3, 0), textcoords="offset points", **look)


def _explain_styles(
  axes: Axes, runs: Sequence[RunHistory], solid: Mapping[str, str], dotted: Mapping[str, str]
) -> None:
  """Adds the meaning of solid and dotted lines, field -> words, to the legend: once for all runs that have them."""
  colour = _GRAY if len(runs) > 1 else _colour(0)
  for meanings, look in ((solid, {}), (dotted, _DOTTED)):
    for name, words in meanings.items():
      if any(run.last(name) is not None for run in runs):
        axes.plot([], [], color=colour, label=words, **look)


def _finished(figure: MatplotlibFigure, axes: Axes) -> MatplotlibFigure:
  """Adds the legend below the axes, where it covers no data."""
  handles, labels = axes.get_legend_handles_labels()
  if labels:
    # Width of an entry in inches: a line with its margins, and the letters.
    columns = max(1, int(figure.get_figwidth() / (0.7 + 0.08 * max(map(len, labels)))))
    look: dict[str, Any] = {"frameon": False, "fontsize": 8, "labelcolor": _INK}
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, **look)
  return figure


def _colour(i: int) -> str:
  return _COLOURS[i % len(_COLOURS)]
