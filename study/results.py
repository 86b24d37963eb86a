"""Entries of one network as seeds with values, and estimates over the seeds.

With the mean over the seeds, paired by seed, goes the 90 % interval of Student's t distribution. That a value is above
a threshold

    holds         if the whole interval lies above it
    fails         if it lies below
    is undecided  if the threshold lies in it, or there are fewer than two seeds
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import scipy.stats

from study.rows import FORM, gamma_name

Values = Mapping[int, float]
"""Seed -> value."""


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Mean over seeds with its 90 % interval; without limits for fewer than two seeds."""

  mean: float
  low: float
  high: float
  count: int

  def verdict(self, threshold: float = 0.0) -> str:
    """Judges that the value is above `threshold`."""
    if self.low > threshold:
      return "holds"
    return "fails" if self.high < threshold else "undecided"

  def __str__(self) -> str:
    if not self.count:
      return "-"
    if self.count == 1:
      return f"{self.mean:+.2f}"
    return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def estimate(values: Iterable[float]) -> Estimate:
  """Estimates a mean from a value for each seed.

  Example:
    >>> str(estimate([1.0, 2.0, 3.0]))
    '+2.00 [+0.31, +3.69]'
  """
  values = list(values)
  mean = statistics.fmean(values) if values else math.nan
  if len(values) < 2:
    return Estimate(mean, -math.inf, math.inf, len(values))
  margin = scipy.stats.t.ppf(0.95, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
  return Estimate(mean, mean - margin, mean + margin, len(values))


def difference(a: Values, b: Values) -> Estimate:
  """Estimates a - b from the seeds that both have."""
  return estimate(a[seed] - b[seed] for seed in sorted(a.keys() & b.keys()))


def holm(gains: Mapping[str, Values]) -> dict[str, float]:
  """Corrects for how many comparisons are made at once.

  Args:
    gains: Comparison -> seed -> by how much a row is better.

  Returns:
    Comparison -> the one-sided p-value of Student's paired test that it is better, by Holm's step-down: sorted from the
    least on, each is multiplied by how many are left, and none is below the one before; 1 for fewer than two seeds.

  References:
    Holm, A simple sequentially rejective multiple test procedure, 1979.

  Example:
    >>> corrected = holm({"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {0: -1.0, 1: 0.5, 2: 0.4}})
    >>> {name: round(p, 3) for name, p in corrected.items()}
    {'a': 0.074, 'b': 0.524}
  """
  raw = {name: _one_sided(list(values.values())) for name, values in gains.items()}
  corrected, least = {}, 0.0
  for rank, name in enumerate(sorted(raw, key=raw.__getitem__)):
    least = corrected[name] = min(1.0, max(least, (len(raw) - rank) * raw[name]))
  return {name: corrected[name] for name in gains}


def _one_sided(values: Sequence[float]) -> float:
  if len(values) < 2:
    return 1.0
  error = statistics.stdev(values) / math.sqrt(len(values))
  mean = statistics.fmean(values)
  if error == 0.0:
    return 0.0 if mean > 0 else 1.0
  return float(scipy.stats.t.sf(mean / error, len(values) - 1))


def combined(verdicts: Iterable[str]) -> str:
  """Returns the verdict over parts that must all hold."""
  found = set(verdicts)
  return next((verdict for verdict in ("fails", "undecided") if verdict in found), "holds" if found else "undecided")


def mean_and_deviation(values: Values, decimals: int = 2) -> str:
  """Formats mean ± standard deviation over seeds.

  Example:
    >>> mean_and_deviation({0: 1.0, 1: 3.0}), mean_and_deviation({0: 1.0}), mean_and_deviation({})
    ('2.00 ± 1.41', '1.00', '-')
  """
  numbers = list(values.values())
  if not numbers:
    return "-"
  mean = f"{statistics.fmean(numbers):.{decimals}f}"
  return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.{decimals}f}"


@dataclasses.dataclass(frozen=True)
class Results:
  """The entries of one network.

  Attributes:
    entries: Entries of its runs, as `records.entry_of` makes them.
    main_gamma: The gamma that is compared with everything else.
    gammas: All gammas, rising.
  """

  entries: Sequence[Mapping[str, Any]]
  main_gamma: float
  gammas: Sequence[float]

  @property
  def main(self) -> str:
    """Name of the row with `main_gamma`."""
    return gamma_name(self.main_gamma)

  @property
  def ours(self) -> list[str]:
    """Names of the rows of the method that the claims are about; the first is the main one."""
    return [self.main, *self.names(FORM)]

  def names(self, prefix: str = "") -> list[str]:
    """Returns the names of the rows there are that begin with `prefix`."""
    return list(dict.fromkeys(entry["row"] for entry in self.entries if entry["row"].startswith(prefix)))

  def of(self, row: str, value: Callable[[Mapping[str, Any]], float | None]) -> dict[int, float]:
    """Returns seed -> value of a row, of those seeds that have one."""
    found = {entry["seed"]: value(entry) for entry in self.entries if entry["row"] == row}
    return {seed: number for seed, number in found.items() if number is not None}

  def accuracy(self, row: str, network: str) -> dict[int, float]:
    """Returns seed -> accuracy in % of "dense", "subnetwork" or "pruned"."""
    return self.of(row, lambda entry: entry["accuracy"].get(network))

  def common_seeds(self, rows: Iterable[str]) -> set[int]:
    """Returns the seeds that all of these rows have, save those rows that were not run."""
    seeds = ({entry["seed"] for entry in self.entries if entry["row"] == row} for row in rows)
    found = [of_row for of_row in seeds if of_row]
    return set.intersection(*found) if found else set()

  def macs(self, row: str) -> str:
    """Formats the share of MACs that a row keeps."""
    return mean_and_deviation(self.of(row, lambda entry: 100 * entry["macs_share"]), 1)
