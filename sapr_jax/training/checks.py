"""Checks of a configuration on the host, before anything is built or compiled."""

from __future__ import annotations

import numbers
from typing import Any

from ml_collections import ConfigDict

from sapr_jax.data import SOURCES
from sapr_jax.errors import InputError
from sapr_jax.method import check_share
from sapr_jax.models import MODELS
from sapr_jax.training.schedules import MIN_NDIM_OF_DECAYED, SCHEDULES

_MOST = 2**31 - 1  # of what is counted: steps and images are int32 on the devices


def check_config(config: Any) -> None:
  """Checks every field whose value can be wrong by itself.

  Raises:
    InputError: At the first one that is missing, of the wrong type or out of range, with its name, the value, what was
      expected.
  """
  if not isinstance(config, ConfigDict):
    raise InputError(f"config is a {type(config).__name__}; expected the ConfigDict of configs/default.py.")
  _check_model(config)
  _check_data(config)
  for name in ("train", "finetune"):
    _check_phase(config, name)
  _check_prune(config)
  _number(config, "generator.data_share", 0.0, 1.0, low_included=False)
  _one_of(config, "generator.statistics", ("running", "batch"))
  for name in ("learning_rate", "temperature"):
    _positive(config, f"generator.{name}")
  _number(config, "generator.bias", float("-inf"), float("inf"), low_included=False, high_included=False)
  for name in ("weight_decay", "macs_weight"):
    _at_least_0(config, f"generator.{name}")
  for name in (
    *("eval_batch_size", "generator.batch_size", "checkpoint.every_epochs", "checkpoint.keep"),
    "report.latency_repeats",
  ):
    _whole(config, name, 1)
  for name in ("steps_per_call", "checkpoint.every_steps", "checkpoint.keep_every_epochs"):
    _whole(config, name, 1, optional=True)
  sizes = _tuple(config, "report.latency_batch_sizes", "(1, 128)")
  if not sizes or not all(_is_whole(size) and 1 <= size <= _MOST for size in sizes):
    raise InputError(
      f"report.latency_batch_sizes={sizes} is out of range; expected at least one whole number of at least 1, such as"
      " '(1, 128)'."
    )


def _check_model(config: ConfigDict) -> None:
  if not _is_whole(seed := _value(config, "seed")) or not 0 <= seed < 2**32:
    raise InputError(f"seed={seed!r} is out of range; expected a whole number of at least 0, below 2**32.")
  _one_of(config, "model.name", MODELS)
  _one_of(config, "model.dtype", ("float32", "bfloat16"))
  _number(config, "model.width_multiplier", 0.0, 100.0, low_included=False)
  _truth(config, "model.remat")
  _path(config, "init.weights")
  _truth(config, "fast_cpu")


def _check_data(config: ConfigDict) -> None:
  _one_of(config, "data.source", SOURCES)
  if not isinstance(name := _value(config, "data.name"), str):
    raise InputError(f"data.name={name!r} is no text; expected the name of a data set, such as 'cifar10'.")
  _path(config, "data.path")
  for field in ("data.flip", "data.stream"):
    _truth(config, field)
  for field in ("mean", "std"):
    _check_statistics(config, f"data.{field}")
  fields = config.data
  if fields.std is not None and 0 in fields.std:
    raise InputError(f"data.std={fields.std} has a zero; the images are divided by it.")
  if len(fields.mean or ()) != len(fields.std or ()):
    raise InputError(f"data.mean={fields.mean} and data.std={fields.std} do not fit; give both or neither.")
  for name in ("train_images", "test_images"):
    _whole(config, f"data.{name}", 1, optional=True)
  _whole(config, "data.crop_padding", 0)
  _whole(config, "data.image_size", 1)
  _whole(config, "data.eval_resize", 1)
  _whole(config, "data.workers", 0, optional=True)
  if not fields.stream:
    return
  if fields.eval_resize < fields.image_size:
    raise InputError(
      f"data.eval_resize={fields.eval_resize} is less than data.image_size={fields.image_size}; expected at least that,"
      f" such as {round(fields.image_size * 8 / 7)}."
    )
  if fields.mean is None or len(fields.mean) != 3:
    raise InputError(
      f"data.mean={fields.mean}: streamed images need mean and deviation of red, green and blue; ImageNet's are"
      " --config.data.mean='(0.485, 0.456, 0.406)' --config.data.std='(0.229, 0.224, 0.225)'."
    )


def _check_statistics(config: ConfigDict, name: str) -> None:
  if _value(config, name) is None:
    return
  value = _tuple(config, name, "(0.5, 0.5, 0.5)")
  if not value or not all(_is_number(v) and 0 <= v <= 1 for v in value):
    raise InputError(f"{name}={value} must have one number in [0, 1] for each channel, such as '(0.5, 0.5, 0.5)'.")


def _check_phase(config: ConfigDict, name: str) -> None:
  epochs = _whole(config, f"{name}.epochs", 1 if name == "train" else 0)
  _whole(config, f"{name}.batch_size", 1)
  _whole(config, f"{name}.accumulate", 1)
  _positive(config, f"{name}.learning_rate")
  _whole(config, f"{name}.base_batch_size", 1, optional=True)
  _number(config, f"{name}.warmup_epochs", 0, max(epochs, 0))
  schedule = _one_of(config, f"{name}.schedule", SCHEDULES)
  _positive(config, f"{name}.decay_factor")
  _number(config, f"{name}.momentum", 0.0, 1.0, high_included=False)
  _truth(config, f"{name}.nesterov")
  _at_least_0(config, f"{name}.weight_decay")
  _one_of(config, f"{name}.weight_decay_of", MIN_NDIM_OF_DECAYED)
  decay = _tuple(config, f"{name}.decay_epochs", "(100, 150)")
  if not all(_is_whole(epoch) for epoch in decay):
    raise InputError(f"{name}.decay_epochs={decay} must be whole epochs, such as '(100, 150)'.")
  rising = list(decay) == sorted(set(decay)) and all(0 < epoch < epochs for epoch in decay)
  if schedule == "step" and epochs and not rising:
    raise InputError(
      f"{name}.decay_epochs={decay} does not fit {name}.epochs={epochs}; expected rising epochs between 0"
      f" and {epochs}, such as --config.{name}.decay_epochs='({epochs // 2},)', or '()' for none."
    )


def _check_prune(config: ConfigDict) -> None:
  share = _value(config, "prune.p")
  if not _is_number(share):
    raise InputError(f"prune.p={share!r} is no number; expected 0 < p <= 1.")
  check_share(share)
  start, epochs = _value(config, "prune.start_epoch"), config.train.epochs
  if not _is_whole(start) or not 0 <= start < epochs:
    raise InputError(
      f"prune.start_epoch={start!r} leaves no epoch for pruning; expected 0 to train.epochs - 1 = {epochs - 1}."
    )
  _at_least_0(config, "prune.gamma")
  hold = _value(config, "prune.hold_epoch")
  if hold is not None and (not _is_whole(hold) or not start < hold <= epochs):
    raise InputError(
      f"prune.hold_epoch={hold!r} is out of range; expected prune.start_epoch + 1 = {start + 1} to train.epochs ="
      f" {epochs}, or None."
    )
  _one_of(config, "prune.form", ("penalty", "proximal"))
  _one_of(config, "prune.weighting", ("relative", "share"))
  _one_of(config, "prune.masks", ("likely", "sampled"))
  _one_of(config, "prune.select", ("blocks", "unjoined", "exact"))
  _whole(config, "prune.min_width", 1)
  _whole(config, "prune.round_to", 1, optional=True)
  _whole(config, "prune.statistics_batches", 0)


# ----------------------------------------------------------------------------------------------------------------------
# One field
# ----------------------------------------------------------------------------------------------------------------------


def _value(config: ConfigDict, name: str) -> Any:
  value: Any = config
  for part in name.split("."):
    if not isinstance(value, ConfigDict) or part not in value:
      raise InputError(f"{name} is missing in the configuration; start from that of configs/default.py, which has all.")
    value = value[part]
  return value


def _is_whole(value: Any) -> bool:
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _whole(config: ConfigDict, name: str, least: int, *, optional: bool = False) -> Any:
  value = _value(config, name)
  if value is None and optional:
    return value
  if not _is_whole(value):
    raise InputError(f"{name}={value!r} is no whole number; expected at least {least}.")
  if value < least:
    raise InputError(f"{name}={value} is out of range; expected at least {least}.")
  if value > _MOST:
    raise InputError(f"{name}={value} is out of range; expected at most {_MOST}.")
  return value


def _positive(config: ConfigDict, name: str) -> None:
  value = _value(config, name)
  if not _is_number(value) or not 0 < value < float("inf"):
    raise InputError(f"{name}={value!r} is out of range; expected a number above 0.")


def _at_least_0(config: ConfigDict, name: str) -> None:
  value = _value(config, name)
  if not _is_number(value) or not 0 <= value < float("inf"):
    raise InputError(f"{name}={value!r} is out of range; expected a number of at least 0.")


def _number(
  config: ConfigDict, name: str, low: float, high: float, *, low_included: bool = True, high_included: bool = True
) -> None:
  value = _value(config, name)
  within = _is_number(value) and (
    low < value < high or (low_included and value == low) or (high_included and value == high)
  )
  if not within:
    left, right = "[" if low_included else "(", "]" if high_included else ")"
    raise InputError(f"{name}={value!r} is out of range; expected a number in {left}{low}, {high}{right}.")


def _one_of(config: ConfigDict, name: str, known: Any) -> Any:
  value = _value(config, name)
  if not isinstance(value, str) or value not in known:
    raise InputError(f"{name}={value!r} is unknown; expected one of {', '.join(known)}.")
  return value


def _truth(config: ConfigDict, name: str) -> None:
  if not isinstance(value := _value(config, name), bool):
    raise InputError(f"{name}={value!r} is no truth value; expected True or False.")


def _tuple(config: ConfigDict, name: str, example: str) -> tuple[Any, ...]:
  value = _value(config, name)
  if not isinstance(value, tuple | list):
    raise InputError(f"{name}={value!r} is no tuple; expected one such as '{example}'.")
  return tuple(value)


def _path(config: ConfigDict, name: str) -> None:
  value = _value(config, name)
  if value is not None and (not isinstance(value, str) or not value or "\0" in value):
    raise InputError(f"{name}={value!r} is no path; expected one, or none at all.")
