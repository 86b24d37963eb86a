"""The grid of the CIFAR-10 study: the rows of each experiment, and which of them are run in what order."""

from __future__ import annotations

import dataclasses
import fnmatch
import pathlib
from collections.abc import Collection, Sequence
from typing import Any

from ml_collections import ConfigDict

from sapr_jax.configs import default
from sapr_jax.errors import InputError
from sapr_jax.training.workdir import DENSE
from study.chosen import (
  CANDIDATE_RATES,
  CHOSEN_ELSEWHERE,
  COMPETING,
  DISTILLED,
  EQUAL,
  FITTED,
  FITTED_ROW,
  GENERATORS,
  MORE_GENERATORS,
  ROUNDED,
  SCALED,
  TILTED,
)
from study.sizes import Experiment, Overrides

MAIN, COMPARED, OTHER_GAMMAS, ABLATIONS = range(4)
"""The parts of the grid, the most informative first."""

FORM = "form="
"""First factor of the row with the main gamma in the other form of the regularization."""
SELECTION = "selection"
"""Rows that only choose channels have names that begin with this."""
ADAPTED = "adapted"
"""Row from whose network, which others trained, the others of its size start."""
TRAINED = "trained"
"""The same where the network was trained here."""
RANKINGS: tuple[tuple[str, str, Overrides], ...] = (
  ("l2_norm", ",shares=scaled", SCALED),
  ("l2_norm", ",shares=tilted", TILTED),
  ("l1_norm", ",shares=equal", EQUAL),
  ("random", "", COMPETING),
  ("l2_norm", "", COMPETING),
  ("l2_norm", ",shares=equal", EQUAL),
  ("taylor", "", {**COMPETING, "generator.batch_size": 32}),
)
"""Importances by which channels are chosen before any training, last factor of the row's name, how scores compare."""

SELECTION_BASELINE = f"{SELECTION}=l1_uniform"
"""The row that the other selections are compared with."""

_SET_BY_ROWS = ("seed", "prune.gamma", "prune.form")
_WITHOUT_GAMMA = {"prune.gamma": 0.0}
_RECALIBRATED = {**_WITHOUT_GAMMA, "prune.statistics_batches": default.get_config().prune.statistics_batches}


@dataclasses.dataclass(frozen=True)
class Row:
  """One way to get a small network, run with several seeds.

  Attributes:
    experiment: Network and schedule.
    name: Its factors, separated by commas: "gamma=0.04,hold_epoch=6". It is unique in the experiment, and tells the
      variant of the method (`study.variants`).
    kind: Which function runs it: a key of `ours.KINDS`, "torch" or "torch_choice".
    part: The part of the grid.
    seeds: Its seeds.
    overrides: Fields of the configuration in which it differs from the other rows.
    choice: What `kind` needs to know beside the configuration.
    source: Name of the row whose finished run it starts from.
    source_seed: Seed of that run; None for its own.
  """

  experiment: Experiment
  name: str
  kind: str
  part: int
  seeds: tuple[int, ...]
  overrides: Overrides
  choice: Any = None
  source: str | None = None
  source_seed: int | None = None

  def seed_of_source(self, seed: int) -> int:
    """Returns the seed of the run from which the one with `seed` starts."""
    return seed if self.source_seed is None else self.source_seed

  @property
  def path(self) -> str:
    """Name of its folder under that of the size; patterns are matched with it."""
    return f"{self.experiment.network}/{self.name}"


def gamma_name(gamma: float) -> str:
  """Names the row of the method with `gamma` and nothing else changed."""
  return f"gamma={gamma:g}"


def grid(experiments: Sequence[Experiment]) -> list[Row]:
  """Returns the rows of all experiments, the most informative first."""
  rows = [row for e in experiments for row in (_pretrained(e) if e.budgets else (*_compared(e), *_varied(e)))]
  return sorted(rows, key=lambda row: row.part)


def _compared(e: Experiment) -> list[Row]:
  """Returns the main rows and those that they are compared with."""
  main, none = gamma_name(e.main_gamma), gamma_name(0)
  form = e.overrides.get("prune.form", e.get_config().prune.form)
  other_form = {"penalty": "proximal", "proximal": "penalty"}[form]

  def other(name: str, kind: str, choice: Any = None, source: str | None = None) -> Row:
    return Row(e, name, kind, COMPARED, e.seeds, _WITHOUT_GAMMA, choice, source)

  def recalibrated(name: str, kind: str, choice: Any, source: str) -> Row:
    return Row(e, name, kind, COMPARED, e.seeds, _RECALIBRATED, choice, source)

  return [
    Row(e, main, "method", MAIN, e.seeds, {"prune.gamma": e.main_gamma}),
    Row(e, none, "method", MAIN, e.seeds, _WITHOUT_GAMMA),
    Row(e, FORM + other_form, "method", COMPARED, e.seeds, {"prune.gamma": e.main_gamma, "prune.form": other_form}),
    other("one_shot_l1=uniform", "one_shot", "uniform", none),
    other("one_shot_l1=global", "one_shot", "global", none),
    other("uniform_width", "width"),
    other("torch_pruning=group_norm", "torch", 0.0),
    other("torch_pruning=group_sl", "torch", 1.0),
    # In the very networks of the main rows.
    *(recalibrated(f"{source},bn=recalibrated", "recalibrated", None, source) for source in (main, none)),
    # Which channels are chosen, in a network that was never regularized.
    recalibrated(SELECTION_BASELINE, "selection", "uniform", none),
    recalibrated(f"{SELECTION}=l1_global", "selection", "global", none),
    recalibrated(f"{SELECTION}=generator,statistics=running", "selection", "generator", none),
    recalibrated(f"{SELECTION}=generator,statistics=batch", "selection", "generator", none),
  ]


def _varied(e: Experiment) -> list[Row]:
  """Returns the rows with other strengths, those that only this experiment has, and the ablations."""
  main = {"prune.gamma": e.main_gamma}
  more = {gamma_name(gamma): {"prune.gamma": gamma} for gamma in e.gammas} | dict(e.more)
  ablations: dict[str, Overrides] = {
    "weighting=share": {},
    "weighting=uniform": {},
    "masks=sampled": {},
    "generator_data=0.05": {"generator.data_share": 0.05},
    "generator_data=0.2": {"generator.data_share": 0.2},
  }
  return [
    *(Row(e, name, "method", OTHER_GAMMAS, e.gamma_seeds, fields) for name, fields in more.items()),
    # The regularization of the alternative gets a choice of strengths too.
    *(
      Row(e, f"torch_pruning=group_sl,strength={s:g}", "torch", OTHER_GAMMAS, e.gamma_seeds, _WITHOUT_GAMMA, s)
      for s in e.strengths
    ),
    *(
      Row(e, name, "method", ABLATIONS, e.ablation_seeds, {**main, **fields})
      for name, fields in ablations.items()
      if e.ablation_seeds
    ),
  ]


def _pretrained(e: Experiment) -> list[Row]:
  """Returns all ways to prune a pretrained network, at each budget; all start from the same adapted one."""
  cut = {"train.epochs": 0, "finetune.epochs": e.epochs, "search.end_epoch": None, "prune.shrinkage": None}

  if e.trained is None:
    start, source_seed = Row(e, ADAPTED, "adapted", MAIN, e.seeds, {"data.train_images": None}), None
  else:
    start, source_seed = Row(e, TRAINED, "trained", MAIN, (0,), e.trained), 0

  def adapted(name: str, kind: str, overrides: Overrides, part: int = COMPARED, choice: Any = None) -> Row:
    return Row(e, name, kind, part, e.seeds, overrides, choice, start.name, source_seed)

  def at_budget(p: float) -> list[Row]:
    with_p = {"prune.p": p}
    main, at_once = f"p={p:g},{e.main_row}", f"p={p:g},{e.main_row.replace('penalty', 'cut')}"
    chosen_by: dict[str, Overrides] = {
      f"{name},penalty{shares}": {"prune.proposer": name, **how} for name, shares, how in RANKINGS
    }
    always = {**with_p, **chosen_by[e.main_row]}  # of the main row, and what changes one thing in it

    def row(name: str, overrides: Overrides, part: int = OTHER_GAMMAS) -> Row:
      return adapted(f"p={p:g},{name}", "method", overrides, part)

    def torch(name: str, overrides: Overrides, choice: Any) -> Row:
      return adapted(f"p={p:g},torch_pruning={name}", "torch", {**with_p, **overrides}, choice=choice)

    fitted = {**with_p, "prune.proposer": "l2_norm", **SCALED, **cut, **FITTED}
    rows: list[Row] = []
    for ours, fields in chosen_by.items():
      rows += [
        row(ours, {**with_p, **fields}, MAIN if ours == e.main_row else OTHER_GAMMAS),
        row(ours.replace("penalty", "cut"), {**with_p, **fields, **cut}, COMPARED),
      ]
    rows += [row(name, {**with_p, **fields}) for name, fields in GENERATORS.items()]
    rows += [
      torch("group_norm", cut, 0.0),
      torch("group_taylor", cut, "taylor"),
      *(torch(f"group_sl,strength={s:g}", {}, s) for s in e.strengths),
      Row(e, f"p={p:g},uniform_width", "width", COMPARED, e.seeds, with_p),
      row(FITTED_ROW, fitted, COMPARED),
      row(f"{FITTED_ROW},distilled", {**fitted, **DISTILLED}),
      adapted(f"p={p:g},{CHOSEN_ELSEWHERE}", "torch_choice", {**with_p, **cut}),
      adapted(f"p={p:g},{CHOSEN_ELSEWHERE},distilled", "torch_choice", {**with_p, **cut, **DISTILLED}, OTHER_GAMMAS),
      adapted(f"{main},round_to=8", "method", {**always, **ROUNDED}, OTHER_GAMMAS),
    ]
    if e.more:
      rows += [row(name, {**with_p, **fields}) for name, fields in MORE_GENERATORS.items()]
    for name, fields in e.more.items():
      rows.append(adapted(f"{main},{name}", "method", {**always, **fields}, OTHER_GAMMAS))
      if name in CANDIDATE_RATES:
        rows.append(adapted(f"{at_once},{name}", "method", {**always, **cut, **fields}, OTHER_GAMMAS))
        rows.append(torch(f"group_norm,{name}", {**cut, **fields}, 0.0))
    return rows

  rows = [adapted("dense", "method", {**cut, "prune.p": 1.0}), *(row for p in e.budgets for row in at_budget(p))]
  return [
    start,
    *(row for row in rows if not e.only or row.name.removeprefix(f"p={row.overrides['prune.p']:g},") in e.only),
  ]


def chosen(
  rows: Sequence[Row],
  patterns: Sequence[str] = (),
  seeds: Collection[int] | None = None,
  recorded: Collection[tuple[str, str, int]] = (),
) -> list[tuple[Row, int]]:
  """Returns what to run, in order: part by part, in each the first seed of every row, then the second.

  A row that starts from the run of another one brings that along.

  Args:
    rows: The grid.
    patterns: Shell patterns over `Row.path` or `Row.name`; none for all rows.
    seeds: Only these; None for all of a row.
    recorded: Runs that need not be done again, as `records.key_of` names them.

  Raises:
    InputError: If a pattern matches no row, or no row has these seeds.
  """
  for pattern in patterns:
    if not any(_matches(row, pattern) for row in rows):
      raise InputError(f"--rows {pattern!r} matches no row; --list shows all.")
  matched = [row for row in rows if not patterns or any(_matches(row, pattern) for pattern in patterns)]
  asked = {(row.path, seed) for row in matched for seed in row.seeds if seeds is None or seed in seeds}
  if not asked:
    raise InputError(
      f"--seeds {' '.join(map(str, seeds or ()))}: none of these rows has such a seed; --list shows all."
    )
  work = [(row, seed) for row in rows for seed in row.seeds]
  asked -= {(f"{network}/{name}", seed) for network, name, seed in recorded}
  asked |= {
    (f"{row.experiment.network}/{row.source}", row.seed_of_source(seed))
    for row, seed in work
    if (row.path, seed) in asked
  }
  kept = [(row, seed) for row, seed in work if (row.path, seed) in asked]
  return sorted(kept, key=lambda item: (item[0].part, item[1]))


def _matches(row: Row, pattern: str) -> bool:
  return fnmatch.fnmatchcase(row.path, pattern) or fnmatch.fnmatchcase(row.name, pattern)


def config_of(row: Row, seed: int, data: str | None, settings: Overrides, weights: str | None = None) -> ConfigDict:
  """Returns the configuration of one run.

  Args:
    row: The row.
    seed: The seed.
    data: Folder of images; None takes the original from tensorflow-datasets.
    settings: Fields that the command line changes in all rows.
    weights: First weights of the row `ADAPTED`.

  Raises:
    InputError: If `settings` names a field that is not there, or gives it a value of another type.
  """
  config = row.experiment.get_config()
  config.update_from_flattened_dict(dict(row.experiment.overrides))
  for name, value in settings.items():
    if name in _SET_BY_ROWS or (data is not None and name in ("data.source", "data.path")):
      raise InputError(f"--set {name}={value}: the rows, --seeds and --data set this field; change any other field.")
    try:
      config.update_from_flattened_dict({name: value})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise InputError(
        f"--set {name}={value}: configs/default.py has no such field, or its value is of another type."
      ) from error
  config.update_from_flattened_dict({**row.overrides, "seed": seed})
  if data is not None:
    config.update_from_flattened_dict({"data.source": "folder", "data.path": data})
  config.report.page = False  # the study draws figures of its own
  if row.name == ADAPTED:
    config.init.weights = weights
  return config


@dataclasses.dataclass(frozen=True)
class Job:
  """One run of the study.

  Attributes:
    row: The row.
    seed: The seed.
    config: The configuration.
    workdir: Its work directory.
    source: Work directory of the finished run that it starts from.
  """

  row: Row
  seed: int
  config: ConfigDict
  workdir: pathlib.Path
  source: pathlib.Path | None

  def __str__(self) -> str:
    return f"{self.row.path}, seed {self.seed}"


def job_of(
  row: Row, seed: int, folder: pathlib.Path, data: str | None, settings: Overrides, weights: str | None = None
) -> Job:
  """Returns one run of the study; arguments as in `config_of`, and the folder of the size."""
  runs = folder / row.experiment.network
  source = None if row.source is None else runs / row.source / f"seed_{row.seed_of_source(seed)}"
  config = config_of(row, seed, data, settings, weights)
  if source is not None and row.source in (ADAPTED, TRAINED):
    config.init.weights = str(source / DENSE)
  return Job(row, seed, config, runs / row.name / f"seed_{seed}", source)
