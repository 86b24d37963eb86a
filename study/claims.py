"""The claims of the paper, judged by what the CIFAR-10 study recorded: a table and a verdict each, by fixed rules."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.measuring import table
from study.chosen import CANDIDATES, CHOSEN_ELSEWHERE, FITTED_ROW, SHORT_CANDIDATES
from study.results import Estimate, Results, combined, difference, estimate, holm, mean_and_deviation
from study.rows import SELECTION, SELECTION_BASELINE, gamma_name
from study.sizes import LONGER

NOTHING_LOST = 0.25
"""Points of accuracy that count as no loss: (a)."""
MUCH_BETTER = 5.0
"""Points of accuracy of the sub-network that count as much: (b)."""
ABOUT_TEN_PERCENT = 11.0
"""Cost of the generator, in % of the weight epochs, that counts as about 10 %: (e)."""
_LEVEL = 0.05
"""One-sided p-value below which a comparison holds: as an interval of 90 % that lies above 0."""
WITHIN = 1.0
"""Points of accuracy by which a sub-network may be behind before fine-tuning, and rounded widths after it."""
NOT_RUN = "Not run yet."
"""`Claim.short` of what no run has tested."""
STABLE = 0.05
"""Hamming distance that the supplement calls small: (d)."""


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim with its judgement.

  Attributes:
    title: What is claimed.
    rule: How it is judged.
    table: Markdown.
    verdict: "holds", "fails" or "undecided".
    remark: What else is to be seen; "" for nothing.
    short: The numbers behind the verdict, for a summary.
    in_summary: Whether a summary has it: not if it only compares forms of one method.
  """

  title: str
  rule: str
  table: str
  verdict: str
  remark: str = ""
  short: str = ""
  in_summary: bool = True

  @property
  def was_tested(self) -> bool:
    """Whether any run says something of it."""
    return self.short != NOT_RUN


def nothing_lost(results: Results) -> Claim:
  """(a): the pruned network is as accurate as the dense one."""
  rows, verdicts = [], []
  for name in results.ours:
    pruned = results.accuracy(name, "pruned")
    for title, row in (("of the same run", name), ("with gamma = 0", gamma_name(0))):
      dense = results.accuracy(row, "dense")
      change = difference(pruned, dense)
      verdicts.append(change.verdict(-NOTHING_LOST))
      seeds = pruned.keys() & dense.keys()  # means over others would not fit the change
      means = [mean_and_deviation({seed: values[seed] for seed in seeds}) for values in (dense, pruned)]
      rows.append([name, title, *means, str(change), verdicts[-1]])
  return Claim(
    f"(a) After fine-tuning, nothing is lost ({results.macs(results.main)} % of the MACs left)",
    f"The change of {results.main} against the dense network of the same run, which is the paper's baseline, is above"
    f" -{NOTHING_LOST} points. A network with gamma = 0, which was never regularized, is the stricter comparison.",
    table(["row", "dense network", "dense, %", "pruned, %", "change, points", "verdict"], rows),
    verdicts[0],
    f"Of {results.main} against gamma = 0 the same rule says: {verdicts[1]}.",
  )


def better_subnetwork(results: Results) -> Claim:
  """(b): before fine-tuning, the sub-network is much better than what one-shot pruning leaves."""
  main = results.accuracy(results.main, "subnetwork")
  rows, verdicts = [[results.main, mean_and_deviation(main), "", ""]], []
  for row in (gamma_name(0), *results.names("one_shot"), "torch_pruning=group_norm"):
    other = results.accuracy(row, "subnetwork")
    gain = difference(main, other)
    verdicts.append(gain.verdict(MUCH_BETTER))
    rows.append([row, mean_and_deviation(other), str(gain), verdicts[-1]])
  return Claim(
    "(b) Partial regularization makes a sub-network that is good before fine-tuning",
    f"Its accuracy is more than {MUCH_BETTER:g} points above that of each network that was cut without regularization,"
    " in one step.",
    table(["row", "sub-network, %", "ours is better by, points", "verdict"], rows),
    combined(verdicts),
  )


def larger_gamma(results: Results) -> Claim:
  """(c): a larger gamma makes the sub-network better and the full model worse."""
  gammas = [gamma for gamma in results.gammas if results.accuracy(gamma_name(gamma), "dense")]
  # A mean over other seeds could not be compared.
  seeds = results.common_seeds(map(gamma_name, gammas))

  def of(gamma: float, network: str) -> dict[int, float]:
    values = results.accuracy(gamma_name(gamma), network)
    return {seed: values[seed] for seed in seeds & values.keys()}

  rows, losses = [], {}
  for gamma in gammas:
    losses[gamma] = difference(of(0, "dense"), of(gamma, "dense"))
    cells = [mean_and_deviation(of(gamma, network)) for network in ("dense", "subnetwork", "pruned")]
    rows.append([f"{gamma:g}", *cells, str(losses[gamma]) if gamma else ""])
  last = results.gammas[-1]
  parts = (
    difference(of(last, "subnetwork"), of(0, "subnetwork")).verdict(),
    difference(of(0, "dense"), of(last, "dense")).verdict(),
  )
  means = {gamma: statistics.fmean(pruned.values()) for gamma in gammas if (pruned := of(gamma, "pruned"))}
  best = f"; the pruned network is best at gamma = {max(means, key=means.__getitem__):g}" if means else ""
  return Claim(
    "(c) A larger gamma makes the sub-network better and the full model worse",
    f"At gamma = {last:g} the sub-network is better, and the dense network worse, than at 0. The turn is the least"
    f" gamma whose loss in the full model has an interval above 0. Seeds {', '.join(map(str, sorted(seeds)))}, which"
    " all of these have.",
    table(["gamma", "full model, %", "sub-network, %", "pruned, %", "full model loses, points"], rows),
    combined(parts),
    f"Sub-network: {parts[0]}; full model: {parts[1]}. The turn: {_turn(losses)}{best}.",
  )


def _turn(losses: Mapping[float, Estimate]) -> str:
  """Says from which gamma on the full model is worse; `losses` has what it loses at each gamma, 0 among them."""
  if 0 not in losses:
    return "gamma = 0 was not run"
  worse_from = next((gamma for gamma, loss in losses.items() if gamma and loss.verdict() == "holds"), None)
  if worse_from is None:
    return "the full model is at no gamma clearly worse"
  return f"the full model is clearly worse from gamma = {worse_from:g} on"


def stable_architecture(results: Results) -> Claim:
  """(d): the architecture settles."""
  row = LONGER if results.names(LONGER) else results.main

  def distances(window: Callable[[int, int], tuple[int, int]]) -> dict[int, float]:
    def mean(entry: Mapping[str, Any]) -> float | None:
      curve = entry["curves"].get("hamming")
      return None if curve is None else mean_of_epochs(curve, *window(entry["start_epoch"], entry["train_epochs"]))

    return results.of(row, mean)

  values = {
    "epochs 8 to 12": distances(lambda start, end: (start + 8, start + 12)),
    "epochs 18 to 22": distances(lambda start, end: (start + 18, start + 22)),
    "last ten epochs": distances(lambda start, end: (end - 9, end)),
  }
  first, second, late = values.values()
  early = difference(dict.fromkeys(first, STABLE), first).verdict()
  falling = difference(second, late).verdict()
  epochs = {entry["train_epochs"] - entry["start_epoch"] for entry in results.entries if entry["row"] == row}
  short = bool(epochs) and max(epochs) < 32  # the last ten would overlap
  return Claim(
    f"(d) The architecture settles ({row})",
    f"The mean Hamming distance of consecutive epochs is below {STABLE} in epochs 8 to 12 after E_start, and in the"
    " last ten epochs it is less than in epochs 18 to 22. A run in which these overlap decides nothing.",
    table(["after E_start", "Hamming distance"], [[n, mean_and_deviation(v, 4)] for n, v in values.items()]),
    "undecided" if short else combined((early, falling)),
    f"These runs have only {max(epochs)} epochs after E_start." if short else f"Small: {early}; falling: {falling}.",
  )


def mean_of_epochs(curve: Mapping[str, Any], first: int, last: int) -> float | None:
  """Returns the mean of a curve from epoch `first` to `last`, both included; None unless it has them all.

  Example:
    >>> mean_of_epochs({"first": 3, "values": [0.5, 0.25, 0.75]}, 4, 5)
    0.5
  """
  start, stop = first - curve["first"], last - curve["first"] + 1
  return statistics.fmean(curve["values"][start:stop]) if 0 <= start < stop <= len(curve["values"]) else None


def cheap_generator(results: Results) -> Claim:
  """(e): the generator costs little."""

  def share(entry: Mapping[str, Any]) -> float | None:
    seconds = entry["seconds"]
    return 100 * seconds["generator_epoch"] / seconds["weight_epoch"] if "generator_epoch" in seconds else None

  rows = []
  for name in [results.main, *results.names("generator_data")]:
    weights = results.of(name, lambda entry: entry["seconds"].get("weight_epoch"))
    generator = results.of(name, lambda entry: entry["seconds"].get("generator_epoch"))
    seconds = [mean_and_deviation(found) for found in (weights, generator)]
    rows.append([name, *seconds, mean_and_deviation(results.of(name, share), 1)])
  shares = results.of(results.main, share)
  return Claim(
    "(e) The generator costs about 10 % of the training time or less",
    f"Its seconds in an epoch are less than {ABOUT_TEN_PERCENT:g} % of those of the weights (medians over the epochs of"
    f" a run), with a tenth of the images ({results.main}).",
    table(["row", "weights, s an epoch", "generator, s an epoch", "generator, %"], rows),
    difference(dict.fromkeys(shares, ABOUT_TEN_PERCENT), shares).verdict(),
    "Runs that share a machine disturb one another; docs/performance.md times the steps by themselves.",
  )


def beats_alternatives(results: Results) -> Claim:
  """(f): at equal MACs, the pruned network is better than what the alternatives make."""
  found = {name: results.accuracy(name, "pruned") for name in results.ours}
  blanks = [""] * (2 * len(found))
  rows = [[name, results.macs(name), mean_and_deviation(own), *blanks] for name, own in found.items()]
  verdicts: dict[str, list[str]] = {name: [] for name in found}
  for row in (*results.names("one_shot"), *results.names("uniform_width"), *results.names("torch_pruning")):
    other = results.accuracy(row, "pruned")
    cells = []
    for name, own in found.items():
      gain = difference(own, other)
      verdicts[name].append(gain.verdict())
      cells += [str(gain), verdicts[name][-1]]
    rows.append([row, results.macs(row), mean_and_deviation(other), *cells])
  others = [f"Of {name} the same rule says: {combined(verdicts[name])}." for name in found if name != results.main]
  return Claim(
    "(f) At equal MACs the method beats the alternatives",
    f"The pruned network of {results.main} is better than each of theirs, whatever their strength; our own gamma was"
    " fixed beforehand. Differences are over the seeds that both rows have, accuracies over all of a row.",
    table(["row", "MACs left, %", "accuracy, %", *(h for n in found for h in (f"{n} is better by", "verdict"))], rows),
    combined(verdicts[results.main]),
    " ".join(others),
  )


def pretrained_claims(results: Results, budget: str, main_row: str) -> list[Claim]:
  """Returns what is claimed of the improved method at one budget, "p=0.3", where a pretrained network is pruned."""
  main = f"{budget},{main_row}"
  plain = [name for name in results.names(f"{budget},") if name != main and not _is_variation(name)]
  parts = [name for name in plain if ",penalty" in name]
  fitted = [name for name in results.names(f"{budget},{FITTED_ROW}") if name.endswith(FITTED_ROW)]
  alternatives = [name for name in plain if name not in parts] + fitted
  beaten, beaten_verdicts, nearest = _against(results, main, alternatives)
  worth, worth_verdicts, nearest_part = _against(results, main, parts)
  rounded = f"{main},round_to=8"
  loss = difference(results.accuracy(rounded, "pruned"), results.accuracy(main, "pruned"))
  rule = (
    f"p is below {_LEVEL:g} after Holm's correction over the rows of this table, by Student's one-sided test, paired by"
    " seed"
  )
  return [
    Claim(
      f"{main_row} beats every alternative",
      f"The pruned network of {main} is better than that of each row without the penalty: {rule}.",
      beaten,
      combined(beaten_verdicts),
      short=nearest,
    ),
    Claim(
      f"{main_row} has better channels than others with the same penalty",
      f"As above, against other ways to choose the channels: {rule}.",
      worth,
      combined(worth_verdicts),
      short=nearest_part,
    ),
    _little_lost_by_the_cut(results, budget, main),
    Claim(
      "Little accuracy is lost by widths in multiples of eight",
      f"The pruned network of {rounded} is less than {WITHIN:g} point behind that of {main}.",
      table(
        ["row", "MACs left, %", "sub-network, %", "pruned, %"],
        [[name, results.macs(name), *_accuracies(results, name)[1:]] for name in (main, rounded)],
      ),
      loss.verdict(-WITHIN),
      short=_in_points(loss),
    ),
  ]


def later_claims(results: Results, budget: str, later_row: str) -> list[Claim]:
  """Returns what is claimed at one budget, "p=0.3", of a row without the penalty that was declared later."""
  later = f"{budget},{later_row}"
  plain = [name for name in results.names(f"{budget},") if name != later and not _is_variation(name)]
  own = [name for name in plain if name.endswith((",shares=scaled", ",shares=tilted"))]
  others = [name for name in plain if name not in own and ",penalty" not in name]
  beaten, verdicts, nearest = _against(results, later, others)
  compared, own_verdicts, nearest_own = _against(results, later, own)
  rule = f"p is below {_LEVEL:g} after Holm's correction over the rows of this table"
  claims = [
    Claim(
      f"{later_row} beats what others do",
      f"The pruned network of {later} is better than that of each row whose channels are chosen in another way, and cut"
      f" without the penalty: {rule}.",
      beaten,
      combined(verdicts),
      short=nearest,
    ),
    Claim(
      f"{later_row} is better than our other forms",
      f"As above, against the older shares and the penalty: {rule}.",
      compared,
      combined(own_verdicts),
      short=nearest_own,
      in_summary=False,
    ),
  ]
  if later_row == FITTED_ROW:
    claims.append(_little_lost_by_the_cut(results, budget, later))
    if results.names(f"{later},distilled"):
      claims.append(_ahead_if_distilled(results, budget, later))
  return claims


def _little_lost_by_the_cut(results: Results, budget: str, name: str) -> Claim:
  subnetwork = results.accuracy(name, "subnetwork")
  changes = {
    "trained as long, whole": difference(subnetwork, results.accuracy("dense", "pruned")),
    "of the same run": difference(subnetwork, results.accuracy(name, "dense")),
  }
  return Claim(
    f"{_row_of(name)} loses little before fine-tuning",
    f"The sub-network of {name}, before fine-tuning, is less than {WITHIN:g} point behind the network that is trained"
    " for all epochs without pruning.",
    table(["dense network", "sub-network - dense, points"], [[row, str(change)] for row, change in changes.items()]),
    changes["trained as long, whole"].verdict(-WITHIN),
    "The dense network of the same run has lost its dropped channels, and with them the fit of its statistics."
    if ",penalty" in name
    else "",
    _in_points(changes["trained as long, whole"]),
  )


def _ahead_if_distilled(results: Results, budget: str, name: str) -> Claim:
  """Compares with group norm's channels as they are cut, in the same run otherwise."""
  distilled = [f"{name},distilled", f"{budget},{CHOSEN_ELSEWHERE},distilled"]
  gain = difference(*(results.accuracy(row, "pruned") for row in distilled))
  return Claim(
    f"{_row_of(name)} is ahead of group norm where both are distilled",
    f"The pruned network of {distilled[0]} is better than that of {distilled[1]}: the interval lies above 0.",
    table(
      ["row", "sub-network, %", "pruned, %"],
      [[row, *_accuracies(results, row)[1:]] for row in distilled],
    ),
    gain.verdict(),
    short=_in_points(gain),
  )


def _row_of(name: str) -> str:
  """Returns the name of a row without its budget."""
  return name.split(",", 1)[1]


def _is_variation(name: str) -> bool:
  """Says whether a row only tries another setting, or has a teacher, which the others have not."""
  return any(
    f",{factor}" in name
    for factor in ("distilled", "fitted", "compensated", "round_to", *CANDIDATES, *SHORT_CANDIDATES)
  )


def _against(results: Results, main: str, others: Sequence[str]) -> tuple[str, list[str], str]:
  """Compares the pruned network of a row with those of others; returns the table, verdicts, and the nearest of them."""
  own = results.accuracy(main, "pruned")
  gains = {
    name: {seed: own[seed] - value for seed, value in results.accuracy(name, "pruned").items() if seed in own}
    for name in others
  }
  corrected = holm(gains)
  verdicts = ["holds" if corrected[name] < _LEVEL else _not_better(gains[name]) for name in others]
  rows = [[main, results.macs(main), *_accuracies(results, main), "", "", ""]]
  rows += [
    [name, results.macs(name), *_accuracies(results, name), str(estimate(gains[name].values())), f"{p:.3f}", verdict]
    for (name, p), verdict in zip(corrected.items(), verdicts, strict=True)
  ]
  header = ["row", "MACs left, %", "dense, %", "sub-network, %", "pruned, %", "main row is better by", "p", "verdict"]
  means = {name: estimate(values.values()) for name, values in gains.items() if values}
  nearest = min(means, key=lambda name: means[name].mean, default=None)
  short = NOT_RUN
  if nearest is not None:
    short = f"{mean_and_deviation(own)} %; against the nearest, {_row_of(nearest)}, {means[nearest]} points."
  return table(header, rows), verdicts, short


def _in_points(difference: Estimate) -> str:
  return f"{difference} points." if difference.count else NOT_RUN


def _accuracies(results: Results, name: str) -> list[str]:
  return [mean_and_deviation(results.accuracy(name, network)) for network in ("dense", "subnetwork", "pruned")]


def _not_better(gains: Mapping[int, float]) -> str:
  return "fails" if estimate(gains.values()).verdict() == "fails" else "undecided"


CLAIMS: tuple[Callable[[Results], Claim], ...] = (
  nothing_lost,
  better_subnetwork,
  larger_gamma,
  stable_architecture,
  cheap_generator,
  beats_alternatives,
)


def open_choices(results: Results) -> str:
  """Returns the table of what the supplement leaves open: what a change of one factor does.

  A row "gamma=0.04,hold_epoch=6" is compared with "gamma=0.04", without its last factor; all others with the main one.
  """
  prefixes = ("weighting", "form", "masks", "generator_data")
  pairs = [(name, results.main) for prefix in prefixes for name in results.names(prefix)]
  pairs += [(name, name.rsplit(",", 1)[0]) for name in results.names("gamma=") if "," in name]
  rows = []
  for name, unchanged in pairs:
    changes = [
      difference(results.accuracy(name, network), results.accuracy(unchanged, network))
      for network in ("dense", "subnetwork", "pruned")
    ]
    rows.append([name, unchanged, *map(str, changes)])
  header = ["changed", "compared with", *(f"{n}, points" for n in ("full model", "sub-network", "pruned"))]
  return table(header, rows) if rows else "None was run."


def selection(results: Results) -> str:
  """Returns the table of how good the channels are that a criterion chooses; "" if none was run."""
  baseline = results.accuracy(SELECTION_BASELINE, "subnetwork")
  rows = []
  for name in results.names(SELECTION):
    found = results.accuracy(name, "subnetwork")
    gain = "" if name == SELECTION_BASELINE else str(difference(found, baseline))
    rows.append([name, mean_and_deviation(found), gain])
  return table(["chosen by", "sub-network, %", f"better than {SELECTION_BASELINE} by, points"], rows) if rows else ""
