"""Fields of a configuration and the values that each may have, checked before anything is built or compiled."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from sapr_jax.channels import SELECTIONS
from sapr_jax.data import SOURCES
from sapr_jax.errors import InputError
from sapr_jax.method import COMPARISONS, COSTS, IMPORTANCES, measured_costs
from sapr_jax.models import MODELS
from sapr_jax.training.inputs import default_resize, image_size
from sapr_jax.training.optimizers import MIN_NDIM_OF_DECAYED, OPTIMIZERS, SCHEDULES
from sapr_jax.training.proposers import PROPOSERS

_INT32_MAX = 2**31 - 1  # steps and images are int32 on the devices


@dataclasses.dataclass(frozen=True)
class Rule:
  """Values that a field may have.

  Attributes:
    expected: The values in words, after "must be".
    accepts: Whether a value is one of them.
  """

  expected: str
  accepts: Callable[[Any], bool]

  def or_unset(self) -> Rule:
    """Returns the rule that accepts None too."""
    return Rule(f"{self.expected}, or unset", lambda value: value is None or self.accepts(value))


def integer(least: int, most: int = _INT32_MAX) -> Rule:
  """Integers from `least` to `most`."""
  upper = "" if most == _INT32_MAX else f" and at most {most}"

  def accepts(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and least <= int(value) <= most

  return Rule(f"an integer of at least {least}{upper}", accepts)


def number(expected: str, accepts: Callable[[float], bool]) -> Rule:
  """Finite numbers of which `accepts` is true."""

  def is_one(value: Any) -> bool:
    return (
      isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value) and accepts(float(value))
    )

  return Rule(expected, is_one)


@dataclasses.dataclass(frozen=True)
class OneOf:
  """Names from a collection, with those that were added to it since."""

  names: Collection[str]

  @property
  def expected(self) -> str:
    return f"one of {', '.join(self.names)}"

  def accepts(self, value: Any) -> bool:
    return isinstance(value, str) and value in self.names

  def or_unset(self) -> Rule:
    """Returns the rule that accepts None too."""
    return Rule(self.expected, self.accepts).or_unset()


def tuple_of(rule: Rule, expected: str, *, empty: bool = False) -> Rule:
  """Tuples whose entries follow a rule."""

  def accepts(value: Any) -> bool:
    return isinstance(value, tuple | list) and (empty or bool(value)) and all(map(rule.accepts, value))

  return Rule(expected, accepts)


POSITIVE = number("a number above 0", lambda x: x > 0)
AT_LEAST_0 = number("a number of at least 0", lambda x: x >= 0)
SHARE = number("a number in (0, 1]", lambda x: 0 < x <= 1)
BOOLEAN = Rule("True or False", lambda value: isinstance(value, bool))
TEXT = Rule("text", lambda value: isinstance(value, str))
NAME = Rule("a name", lambda value: isinstance(value, str) and value != "")
PATH = Rule("a path", lambda value: isinstance(value, str) and value != "" and "\0" not in value)
CHANNELS = tuple_of(
  number("", lambda x: 0 <= x <= 1), "a tuple with a number in [0, 1] for each channel, such as '(0.5, 0.5, 0.5)'"
)
GLOBS = tuple_of(NAME, "a tuple of globs, such as '(\"stage1*\",)'", empty=True)


def _phase(name: str, least_epochs: int) -> dict[str, Rule | OneOf]:
  return {
    f"{name}.epochs": integer(least_epochs),
    f"{name}.optimizer": OneOf(OPTIMIZERS),
    f"{name}.batch_size": integer(1),
    f"{name}.accumulate": integer(1),
    f"{name}.learning_rate": POSITIVE,
    f"{name}.base_batch_size": integer(1).or_unset(),
    f"{name}.warmup_epochs": AT_LEAST_0,
    f"{name}.schedule": OneOf(SCHEDULES),
    f"{name}.decay_epochs": tuple_of(integer(0), "a tuple of integers, such as '(100, 150)'", empty=True),
    f"{name}.decay_factor": POSITIVE,
    f"{name}.momentum": number("a number in [0, 1)", lambda x: 0 <= x < 1),
    f"{name}.nesterov": BOOLEAN,
    f"{name}.weight_decay": AT_LEAST_0,
    f"{name}.weight_decay_of": OneOf(MIN_NDIM_OF_DECAYED),
    f"{name}.distillation.weight": number("a number in [0, 1]", lambda x: 0 <= x <= 1),
    f"{name}.distillation.temperature": POSITIVE,
  }


FIELDS: dict[str, Rule | OneOf] = {
  "seed": integer(0, 2**32 - 1),
  "steps_per_call": integer(1).or_unset(),
  "eval_batch_size": integer(1),
  "fast_cpu": BOOLEAN,
  "model.name": OneOf(MODELS),
  "model.width_multiplier": number("a number in (0, 100]", lambda x: 0 < x <= 100),
  "model.dtype": OneOf(("float32", "bfloat16")),
  "model.remat": BOOLEAN,
  "init.weights": PATH.or_unset(),
  "data.source": OneOf(SOURCES),
  "data.name": TEXT,
  "data.path": PATH.or_unset(),
  "data.train_images": integer(1).or_unset(),
  "data.test_images": integer(1).or_unset(),
  "data.validation_images": integer(1).or_unset(),
  "data.mean": CHANNELS.or_unset(),
  "data.std": CHANNELS.or_unset(),
  "data.flip": BOOLEAN,
  "data.stream": BOOLEAN,
  "data.crop_padding": integer(0, 2**16),  # no format has larger images; the feed knows how large these are
  "data.image_size": integer(1).or_unset(),
  "data.eval_resize": integer(1).or_unset(),
  "data.workers": integer(0).or_unset(),
  "data.skip_broken": integer(0),
  "data.changed_ok": BOOLEAN,
  **_phase("train", least_epochs=0),
  **_phase("finetune", least_epochs=0),
  "prune.proposer": OneOf(PROPOSERS),
  "prune.cost": OneOf(COSTS),
  "prune.latency_table": PATH.or_unset(),
  "prune.latency_batch_size": integer(1).or_unset(),
  "prune.p": SHARE,
  "prune.limit": POSITIVE.or_unset(),
  "prune.start_epoch": integer(0),
  "prune.gamma": AT_LEAST_0,
  "prune.shrinkage": AT_LEAST_0.or_unset(),
  "prune.form": OneOf(("penalty", "proximal")),
  "prune.select": OneOf(SELECTIONS),
  "prune.include": GLOBS,
  "prune.exclude": GLOBS,
  "prune.min_width": integer(1),
  "prune.round_to": integer(1).or_unset(),
  "prune.statistics_batches": integer(0),
  "prune.compensation_batches": integer(0),
  "importance.compare": OneOf(COMPARISONS),
  "importance.cost_exponent": AT_LEAST_0,
  "search.start_epoch": integer(0).or_unset(),
  "search.end_epoch": integer(1).or_unset(),
  "generator.data_share": SHARE,
  "generator.batch_size": integer(1),
  "generator.learning_rate": POSITIVE,
  "generator.weight_decay": AT_LEAST_0,
  "generator.budget_weight": AT_LEAST_0,
  "generator.bias": number("a number", lambda x: True),
  "generator.temperature": POSITIVE,
  "generator.prior": OneOf(IMPORTANCES).or_unset(),
  "generator.prior_strength": POSITIVE,
  "generator.order": OneOf(IMPORTANCES).or_unset(),
  "evaluate.every_epochs": integer(1),
  "checkpoint.every_epochs": integer(1),
  "checkpoint.every_steps": integer(1).or_unset(),
  "checkpoint.keep": integer(1),
  "checkpoint.keep_every_epochs": integer(1).or_unset(),
  "report.latency_batch_sizes": tuple_of(integer(1), "a tuple of integers of at least 1, such as '(1, 128)'"),
  "report.latency_repeats": integer(1),
  "report.page": BOOLEAN,
  "report.wandb_project": NAME.or_unset(),
}
"""Name of a field, with dots -> its values. `configs/default.py` says what each field means."""


def check_config(config: Any) -> None:
  """Checks every field by its rule, and then the fields that must fit together.

  Raises:
    InputError: At the first field that is missing or wrong, with its name, its values and the value given.
  """
  if not isinstance(config, ConfigDict):
    raise InputError(f"config must be the ConfigDict of configs/default.py, got a {type(config).__name__}.")
  for name, rule in FIELDS.items():
    if not rule.accepts(value := _value(config, name)):
      raise InputError(f"{name} must be {rule.expected}, got {value!r}.")
  unknown = sorted(traverse_util.flatten_dict(config.to_dict(), sep=".").keys() - FIELDS.keys())
  if unknown:
    near = difflib.get_close_matches(unknown[0], FIELDS, 1)
    hint = f"did you mean {near[0]}?" if near else "configs/default.py has all fields."
    raise InputError(f"the configuration must have no other fields than these, got {unknown[0]}; {hint}")
  for name in ("train", "finetune"):
    _check_schedule(name, config[name])
  check_images(config.data)
  if config.init.weights is None:
    check_streamed(config.data)  # else it may be the inputs of that network
  _check_epochs(config)
  if config.data.validation_images is not None and config.data.test_images is not None:
    raise InputError(
      f"data.test_images must be unset where data.validation_images={config.data.validation_images} are evaluated in"
      f" their place, got {config.data.test_images}."
    )
  for name in ("latency_table", "latency_batch_size"):
    if (value := config.prune[name]) is not None and config.prune.cost not in (costs := measured_costs()):
      raise InputError(f"prune.{name} must be unset unless prune.cost={' or '.join(costs)}, got {value!r}.")
  if config.train.optimizer != "sgd" and config.prune.form == "penalty":
    raise InputError(
      f"prune.form must be proximal where train.optimizer={config.train.optimizer}, which would rescale a penalty's"
      " gradient, got penalty."
    )
  distilled = any(config[name].distillation.weight for name in ("train", "finetune"))
  if distilled and config.prune.start_epoch == 0 and config.init.weights is None:
    raise InputError(
      "distillation must have a trained network to learn from, got prune.start_epoch=0 and no init.weights; give the"
      " weights, or train for some epochs first."
    )


def _check_epochs(config: Any) -> None:
  start, epochs = config.prune.start_epoch, config.train.epochs
  if start > max(0, epochs - 1):
    raise InputError(
      f"prune.start_epoch must be at most train.epochs - 1 = {epochs - 1}, got {start}, which leaves no epoch for"
      " pruning."
      if epochs
      else f"prune.start_epoch must be 0 where train.epochs=0, as nothing is trained before the cut, got {start}."
    )
  if (search := config.search).start_epoch is not None and search.start_epoch > start:
    raise InputError(
      f"search.start_epoch must be at most prune.start_epoch = {start}, got {search.start_epoch}; leave it unset to"
      " begin with that epoch."
    )
  if search.end_epoch is not None and search.end_epoch <= start:
    raise InputError(
      f"search.end_epoch must be above prune.start_epoch = {start}, got {search.end_epoch}, which leaves no masks to be"
      " in force."
    )


def _value(config: ConfigDict, name: str) -> Any:
  value: Any = config
  for part in name.split("."):
    if not isinstance(value, ConfigDict) or part not in value:
      raise InputError(f"{name} is missing in the configuration; start from that of configs/default.py, which has all.")
    value = value[part]
  return value


def _check_schedule(name: str, phase: Any) -> None:
  decay, epochs = list(phase.decay_epochs), phase.epochs
  if phase.warmup_epochs > epochs:
    raise InputError(f"{name}.warmup_epochs must be at most {name}.epochs = {epochs}, got {phase.warmup_epochs}.")
  rising = decay == sorted(set(decay)) and all(0 < epoch < epochs for epoch in decay)
  if phase.schedule == "step" and epochs and not rising:
    examples = f"'({epochs // 2},)', or '()' for none" if epochs > 1 else "'()'"
    raise InputError(
      f"{name}.decay_epochs must be rising epochs between 0 and {name}.epochs = {epochs}, got {tuple(decay)}; such as"
      f" --config.{name}.decay_epochs={examples}."
    )


def check_images(fields: Any) -> None:
  """Checks how images are normalized, as far as that is set."""
  if len(fields.mean or ()) != len(fields.std or ()):
    raise InputError(f"data.mean and data.std must be of one length, got {fields.mean} and {fields.std}.")
  if fields.std is not None and 0 in fields.std:
    raise InputError(f"data.std must have no zero, got {fields.std}; the images are divided by it.")


def check_streamed(fields: Any) -> None:
  """Checks that streamed images have a size and a normalization."""
  if not fields.stream:
    return
  size = image_size(fields)
  if fields.eval_resize is not None and fields.eval_resize < size:
    raise InputError(
      f"data.eval_resize must be at least data.image_size = {size}, got {fields.eval_resize}; such as"
      f" {default_resize(size)}."
    )
  if fields.mean is None or len(fields.mean) != 3:
    raise InputError(
      f"data.mean must have red, green and blue where images are streamed, got {fields.mean}; ImageNet's are"
      " --config.data.mean='(0.485, 0.456, 0.406)' --config.data.std='(0.229, 0.224, 0.225)'."
    )
