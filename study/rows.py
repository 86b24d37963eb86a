"""The grid of the CIFAR-10 study: its sizes, their networks and schedules, and the rows that are run of each."""

from __future__ import annotations

import dataclasses
import fnmatch
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from configs import default, mobilenetv2_cifar10, resnet56_cifar10
from sapr_jax.errors import InputError

MAIN, COMPARED, OTHER_GAMMAS, ABLATIONS = range(4)
"""The parts of the grid, the most informative first."""


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A network with its schedule, in all rows the same.

  Attributes:
    network: A name in `sapr_jax.models.MODELS`.
    get_config: Returns its configuration.
    overrides: Fields that differ from it.
    main_gamma: The strength of the partial regularization that is compared with everything else.
    gammas: The other ones above 0.
    seeds: Of the rows with `main_gamma`, in both forms, and 0, and of the alternatives.
    gamma_seeds: Of the rows with other gammas.
    ablation_seeds: Of the ablations; () for none.
    strengths: Of the sparse learning in PyTorch, beside 1. In the full size 10 is about its recipe's own coefficient.
    variants: Name of a further row -> its fields, gamma among them: what else a size is to show of the method.
  """

  network: str
  get_config: Callable[[], ConfigDict]
  overrides: Mapping[str, Any]
  main_gamma: float
  gammas: tuple[float, ...]
  seeds: tuple[int, ...]
  gamma_seeds: tuple[int, ...]
  ablation_seeds: tuple[int, ...]
  strengths: tuple[float, ...]
  variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
  """One way to get a small network, run with several seeds.

  Attributes:
    experiment: Network and schedule.
    name: What is done, unique in the experiment: "gamma=0.0005".
    kind: Which function runs it: a key of `study_ours.KINDS`, or "torch".
    part: The part of the grid.
    seeds: Its seeds.
    overrides: Fields of the configuration in which it differs from the other rows.
    choice: What `kind` needs to know beside the configuration.
    source: Name of the row whose finished run it starts from.
  """

  experiment: Experiment
  name: str
  kind: str
  part: int
  seeds: tuple[int, ...]
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  choice: Any = None
  source: str | None = None

  @property
  def path(self) -> str:
    """Name of its folder under that of the size, and what patterns are matched with."""
    return f"{self.experiment.network}/{self.name}"


FORM = "form="
"""Name of the row with the main gamma in the other form of the regularization begins with this."""

LONGER = "longer_schedule"
"""Name of a variant with so many epochs that an architecture has the time to settle."""

SELECTION = "selection"
"""Names of rows that only choose channels begin with this."""
SELECTION_BASELINE = f"{SELECTION}=l1_uniform"
"""The one that the others are compared with."""

_OF_ROWS = ("seed", "prune.gamma", "prune.form")
"""Fields that rows differ in, in every size."""

THREE, FOUR, SIX = (0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5)
GAMMAS = (1e-4, 1e-3, 5e-3)  # beside 0 and 5e-4: supplement C
# As in the paper: single channels are cut on every backend, as the alternatives do; and sub-networks are measured with
# the statistics that they inherit, but in the rows that ask what new ones would give.
_COMMON = {"prune.round_to": 1, "prune.statistics_batches": 0}
_RECALIBRATED = {"prune.gamma": 0.0, "prune.statistics_batches": default.get_config().prune.statistics_batches}

# What a dropped filter can lose over a run is the sum over steps of learning_rate / (1 - momentum) * gamma * N_k / N. A
# short schedule has few steps, so that the same loss takes a larger gamma: 0.02 here takes the 2.6 that 1e-4 takes over
# the paper's schedule, 0.2 the 26 of 1e-3. An earlier rehearsal with other epochs aligned well at 2.6, hence
# `main_gamma`, which was fixed before this study.
_REDUCED = {
  **_COMMON,
  "prune.form": "proximal",  # the default when this study began
  "model.name": "resnet20",
  "model.width_multiplier": 0.5,
  "data.train_images": 3200,
  "data.test_images": 2000,
  "train.epochs": 12,
  "train.batch_size": 64,
  "train.learning_rate": 0.05,
  "train.decay_epochs": (8, 11),
  "prune.start_epoch": 3,
  "generator.batch_size": 32,
  "generator.learning_rate": 1e-2,  # a hundred steps in all, where the paper's schedule has thousands
  "finetune.epochs": 4,
  "finetune.batch_size": 64,
  "finetune.learning_rate": 0.02,
  "finetune.decay_epochs": (3,),
  "report.latency_repeats": 1,
  "report.latency_batch_sizes": (1,),
}

# As the paper's, E_start is a fifth of it and the steps of the learning rate come late; gamma keeps the loss of 2.6.
_LONGER = {
  "train.epochs": 45,
  "train.decay_epochs": (30, 40),
  "prune.start_epoch": 9,
  "prune.gamma": 0.005,
}

# Where less is left, and more images were seen, it matters more what is left. By the sum above a dropped filter can
# lose 3.3 with `main_gamma`, about as much as where the reduced size's pruned network was best; 13 with the other.
_QUARTER = {**_REDUCED, "prune.p": 0.25, "data.train_images": 8000, "data.test_images": 10_000}


def _scaled_decay(phase: str) -> dict[str, Any]:
  """Returns a weight decay that does to convolutions in a short training what 1e-4 does in the paper's.

  By itself it shrinks a weight by the factor exp(-s / (1 - momentum)), where s is the sum over steps of learning_rate *
  weight_decay: 0.41 when the paper trains, 0.005 in `_QUARTER` with 1e-4, and 0.41 with this. A normalization undoes
  the scale of the convolution before it, so that nothing but the decay limits how long its weights grow, and so how
  little they turn in a step. The loss does feel the scale of other parameters, for which it would be too much.
  """
  return {f"{phase}.weight_decay": 0.008, f"{phase}.weight_decay_of": "convolutions"}


# A strong regularization makes the first masks final, and later ones exchange trained channels for empty ones. What if
# the generator learns on more images, with the statistics of its sub-networks, or not at all from an epoch on? What if
# the regularization is a penalty, and if weight decay is felt, as is what sparse learning has in its place?
_OF_QUARTER: dict[str, dict[str, Any]] = {
  "gamma=0.04,form=penalty": {"prune.gamma": 0.04, "prune.form": "penalty"},
  "gamma=0.04,form=penalty,weight_decay=scaled": {
    "prune.gamma": 0.04,
    "prune.form": "penalty",
    **_scaled_decay("train"),
  },
  "gamma=0.04,generator_data=0.5": {"prune.gamma": 0.04, "generator.data_share": 0.5},
  "gamma=0.04,generator_statistics=batch": {"prune.gamma": 0.04, "generator.statistics": "batch"},
  "gamma=0.04,hold_epoch=6": {"prune.gamma": 0.04, "prune.hold_epoch": 6},
}

# All proportions of the paper's schedule: E_start, the steps of the learning rate, a fine-tuning that begins with the
# rate of training and takes four fifths of its epochs. By the sum above 0.04 takes what 5e-4 takes there, 13.
_FIFTH = {
  **_REDUCED,
  "prune.p": 0.25,
  "data.test_images": 4000,
  "train.epochs": 40,
  "train.decay_epochs": (20, 30),
  "prune.start_epoch": 8,
  "finetune.epochs": 32,
  "finetune.learning_rate": 0.05,
  "finetune.decay_epochs": (16, 24),
}

# All methods with that weight decay, which fine-tuning and what is trained from scratch have too.
_DECAYED = {
  **_QUARTER,
  "prune.form": "penalty",
  **_scaled_decay("train"),
  **_scaled_decay("finetune"),
}

SIZES: dict[str, tuple[Experiment, ...]] = {
  "full": (
    Experiment("resnet56", resnet56_cifar10.get_config, _COMMON, 5e-4, GAMMAS, THREE, THREE, (0,), (0.3, 10.0)),
    Experiment(
      "mobilenetv2_cifar", mobilenetv2_cifar10.get_config, _COMMON, 5e-4, GAMMAS, THREE, (0,), (), (0.3, 10.0)
    ),
  ),
  "reduced": (
    Experiment(
      "resnet20",
      resnet56_cifar10.get_config,
      _REDUCED,
      0.02,
      (0.006, 0.06, 0.2),
      SIX,
      THREE,
      THREE,
      (0.3, 3.0),
      {LONGER: _LONGER},
    ),
  ),
  "quarter": (
    Experiment("resnet20", resnet56_cifar10.get_config, _QUARTER, 0.01, (0.04,), FOUR, THREE, (), (0.3,), _OF_QUARTER),
  ),
  "decayed": (Experiment("resnet20", resnet56_cifar10.get_config, _DECAYED, 0.04, (), THREE, THREE, (), ()),),
  "fifth": (Experiment("resnet20", resnet56_cifar10.get_config, _FIFTH, 0.04, (), THREE, THREE, (), ()),),
}
"""Name -> the experiments of that size."""


def gamma_name(gamma: float) -> str:
  """Names the row of the method with `gamma` and nothing else changed."""
  return f"gamma={gamma:g}"


def grid(experiments: Sequence[Experiment]) -> list[Row]:
  """Returns the rows of all experiments, the most informative first."""
  rows = [row for experiment in experiments for row in _rows(experiment)]
  return sorted(rows, key=lambda row: row.part)


def _rows(experiment: Experiment) -> list[Row]:
  main, none = gamma_name(experiment.main_gamma), gamma_name(0)
  form = experiment.overrides.get("prune.form", experiment.get_config().prune.form)
  other_form = {"penalty": "proximal", "proximal": "penalty"}[form]

  def ours(name: str, part: int, seeds: tuple[int, ...], **overrides: Any) -> Row:
    fields = {"prune.gamma": experiment.main_gamma}
    return Row(experiment, name, "ours", part, seeds, fields | {k.replace("__", "."): v for k, v in overrides.items()})

  def other(name: str, kind: str, choice: Any = None, source: str | None = None, part: int = COMPARED) -> Row:
    seeds = experiment.seeds if part == COMPARED else experiment.gamma_seeds
    return Row(experiment, name, kind, part, seeds, {"prune.gamma": 0.0}, choice, source)

  def recalibrated(source: str) -> Row:
    name = f"{source},bn=recalibrated"
    return Row(experiment, name, "recalibrated", COMPARED, experiment.seeds, _RECALIBRATED, source=source)

  def selection(name: str, choice: str, **fields: Any) -> Row:
    return Row(experiment, name, "selection", COMPARED, experiment.seeds, _RECALIBRATED | fields, choice, none)

  rows = [
    ours(main, MAIN, experiment.seeds),
    ours(none, MAIN, experiment.seeds, prune__gamma=0.0),
    ours(f"{FORM}{other_form}", COMPARED, experiment.seeds, prune__form=other_form),
    other("one_shot_l1=uniform", "one_shot", "uniform", none),
    other("one_shot_l1=global", "one_shot", "global", none),
    other("uniform_width", "width"),
    other("torch_pruning=group_norm", "torch", 0.0),
    other("torch_pruning=group_sl", "torch", 1.0),
    # In the very networks of the main rows.
    recalibrated(main),
    recalibrated(none),
    # Which channels are chosen, in a network that was never regularized.
    selection(SELECTION_BASELINE, "uniform"),
    selection(f"{SELECTION}=l1_global", "global"),
    *(
      selection(f"{SELECTION}=generator,statistics={name}", "generator", **{"generator.statistics": name})
      for name in ("running", "batch")
    ),
  ]
  rows += [ours(gamma_name(g), OTHER_GAMMAS, experiment.gamma_seeds, prune__gamma=g) for g in experiment.gammas]
  rows += [
    Row(experiment, name, "ours", OTHER_GAMMAS, experiment.gamma_seeds, fields)
    for name, fields in experiment.variants.items()
  ]
  # The regularization of the alternative gets a choice of strengths too.
  rows += [other(f"torch_pruning=group_sl,strength={s:g}", "torch", s, part=OTHER_GAMMAS) for s in experiment.strengths]
  if experiment.ablation_seeds:
    rows += [
      ours(f"{name}={value}", ABLATIONS, experiment.ablation_seeds, **{field: value})
      for name, field, value in (
        ("weighting", "prune__weighting", "share"),
        ("weighting", "prune__weighting", "uniform"),
        ("masks", "prune__masks", "sampled"),
        ("generator_data", "generator__data_share", 0.05),
        ("generator_data", "generator__data_share", 0.2),
      )
    ]
  return rows


def chosen(rows: Sequence[Row], patterns: Sequence[str], seeds: Sequence[int] | None) -> list[tuple[Row, int]]:
  """Returns what to run, in order: part by part, in each the first seed of every row, then the second.

  Args:
    rows: The grid.
    patterns: Shell patterns over `Row.path` or `Row.name`; none for all rows.
    seeds: Only these; None for all of a row.

  Raises:
    InputError: If a pattern matches no row, or no row has these seeds.
  """
  matched = {id(row) for row in rows if not patterns or any(_matches(row, pattern) for pattern in patterns)}
  for pattern in patterns:
    if not any(_matches(row, pattern) for row in rows):
      raise InputError(f"--rows {pattern!r} matches no row; --list shows all.")
  work = [(row, seed) for row in rows if id(row) in matched for seed in row.seeds if seeds is None or seed in seeds]
  if not work:
    raise InputError(
      f"--seeds {' '.join(map(str, seeds or ()))}: none of these rows has such a seed; --list shows all."
    )
  return sorted(work, key=lambda item: (item[0].part, item[1]))


def _matches(row: Row, pattern: str) -> bool:
  return fnmatch.fnmatchcase(row.path, pattern) or fnmatch.fnmatchcase(row.name, pattern)


def config_of(row: Row, seed: int, data: str | None, settings: Mapping[str, Any]) -> ConfigDict:
  """Returns the configuration of one run.

  Args:
    row: The row.
    seed: The seed.
    data: Folder of images; None takes the original from tensorflow-datasets.
    settings: Fields that the command line changes in all rows.

  Raises:
    InputError: If `settings` names a field that is not there, or gives it a value of another type.
  """
  config = row.experiment.get_config()
  config.update_from_flattened_dict(dict(row.experiment.overrides))
  for name, value in settings.items():
    if name in _OF_ROWS or (data is not None and name in ("data.source", "data.path")):
      raise InputError(f"--set {name}={value}: rows, --seeds and --data say that; change any other field.")
    try:
      config.update_from_flattened_dict({name: value})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise InputError(
        f"--set {name}={value}: configs/default.py has no such field, or its value is of another type."
      ) from error
  config.update_from_flattened_dict({**row.overrides, "seed": seed})
  if data is not None:
    config.update_from_flattened_dict({"data.source": "folder", "data.path": data})
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


def workdir_of(row: Row, seed: int, folder: pathlib.Path, name: str | None = None) -> pathlib.Path:
  """Returns the work directory of a run, or of that of another row of the same experiment."""
  return folder / row.experiment.network / (row.name if name is None else name) / f"seed_{seed}"


def job_of(row: Row, seed: int, folder: pathlib.Path, data: str | None, settings: Mapping[str, Any]) -> Job:
  """Returns one run of the study; arguments as of `config_of`, and the folder of the size."""
  source = None if row.source is None else workdir_of(row, seed, folder, row.source)
  return Job(row, seed, config_of(row, seed, data, settings), workdir_of(row, seed, folder), source)
