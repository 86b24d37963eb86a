"""Checks of a configuration on the host, before anything is built or compiled."""

from __future__ import annotations

from typing import Any

from sapr_jax.data import SOURCES
from sapr_jax.errors import InputError
from sapr_jax.method import check_share
from sapr_jax.models import MODELS
from sapr_jax.training.schedules import SCHEDULES


def check_config(config: Any) -> None:
  """Checks every field whose value can be wrong by itself.

  Raises:
    InputError: At the first wrong one, with its name, the value, what was expected.
  """
  _one_of("model.name", config.model.name, MODELS)
  _one_of("model.dtype", config.model.dtype, ("float32", "bfloat16"))
  _positive("model.width_multiplier", config.model.width_multiplier)
  _check_data(config.data)
  for name in ("train", "finetune"):
    _check_phase(name, config[name])
  _check_prune(config)
  generator = config.generator
  _in_range("generator.data_share", generator.data_share, 0.0, 1.0, low_included=False)
  for name in ("learning_rate", "temperature"):
    _positive(f"generator.{name}", generator[name])
  _in_range("generator.bias", generator.bias, float("-inf"), float("inf"), low_included=False, high_included=False)
  for name in ("weight_decay", "macs_weight"):
    _at_least(f"generator.{name}", generator[name], 0)
  for name, value in (
    ("steps_per_call", config.steps_per_call),
    ("eval_batch_size", config.eval_batch_size),
    ("generator.batch_size", generator.batch_size),
    ("checkpoint.every_epochs", config.checkpoint.every_epochs),
    ("checkpoint.every_steps", config.checkpoint.every_steps),
    ("checkpoint.keep", config.checkpoint.keep),
    ("checkpoint.keep_every_epochs", config.checkpoint.keep_every_epochs),
    ("report.latency_repeats", config.report.latency_repeats),
    *(("report.latency_batch_sizes", size) for size in config.report.latency_batch_sizes),
  ):
    if value is not None:
      _at_least(name, value, 1)


def _check_data(fields: Any) -> None:
  _one_of("data.source", fields.source, SOURCES)
  for name in ("mean", "std"):
    value = fields[name]
    if value is not None and not all(isinstance(v, int | float) and 0 <= v <= 1 for v in value):
      raise InputError(f"data.{name}={value} must have one number in [0, 1] for each channel.")
  if fields.std is not None and 0 in fields.std:
    raise InputError(f"data.std={fields.std} has a zero; the images are divided by it.")
  if len(fields.mean or ()) != len(fields.std or ()):
    raise InputError(f"data.mean={fields.mean} and data.std={fields.std} do not fit; give both or neither.")
  _at_least("data.crop_padding", fields.crop_padding, 0)
  _at_least("data.image_size", fields.image_size, 1)
  if fields.workers is not None:
    _at_least("data.workers", fields.workers, 0)
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


def _check_phase(name: str, phase: Any) -> None:
  _at_least(f"{name}.epochs", phase.epochs, 1 if name == "train" else 0)
  _at_least(f"{name}.batch_size", phase.batch_size, 1)
  _positive(f"{name}.learning_rate", phase.learning_rate)
  _one_of(f"{name}.schedule", phase.schedule, SCHEDULES)
  _positive(f"{name}.decay_factor", phase.decay_factor)
  _in_range(f"{name}.momentum", phase.momentum, 0.0, 1.0, high_included=False)
  _at_least(f"{name}.weight_decay", phase.weight_decay, 0)
  decay = list(phase.decay_epochs)
  if not all(isinstance(epoch, int) for epoch in decay):
    raise InputError(f"{name}.decay_epochs={tuple(decay)} must be whole epochs, such as '(100, 150)'.")
  if (
    phase.schedule == "step"
    and phase.epochs
    and (decay != sorted(set(decay)) or not all(0 < e < phase.epochs for e in decay))
  ):
    raise InputError(
      f"{name}.decay_epochs={tuple(decay)} does not fit {name}.epochs={phase.epochs}; expected rising epochs between 0"
      f" and {phase.epochs}, such as --config.{name}.decay_epochs='({phase.epochs // 2},)', or '()' for none."
    )


def _check_prune(config: Any) -> None:
  prune = config.prune
  check_share(prune.p)
  if not 0 <= prune.start_epoch < config.train.epochs:
    raise InputError(
      f"prune.start_epoch={prune.start_epoch} leaves no epoch for pruning; expected 0 to train.epochs - 1 ="
      f" {config.train.epochs - 1}."
    )
  _at_least("prune.gamma", prune.gamma, 0)
  _one_of("prune.form", prune.form, ("proximal", "penalty"))
  _one_of("prune.weighting", prune.weighting, ("relative", "share", "uniform"))
  _one_of("prune.select", prune.select, ("blocks", "unjoined", "exact"))
  _at_least("prune.min_width", prune.min_width, 1)
  _at_least("prune.round_to", prune.round_to, 1)


def _one_of(name: str, value: Any, known: Any) -> None:
  if value not in known:
    raise InputError(f"{name}={value!r} is unknown; expected one of {', '.join(known)}.")


def _positive(name: str, value: float) -> None:
  if not 0 < value < float("inf"):
    raise InputError(f"{name}={value} is out of range; expected a number above 0.")


def _at_least(name: str, value: float, least: float) -> None:
  if not least <= value < float("inf"):
    raise InputError(f"{name}={value} is out of range; expected at least {least}.")


def _in_range(
  name: str, value: float, low: float, high: float, *, low_included: bool = True, high_included: bool = True
) -> None:
  if not (low < value < high or (low_included and value == low) or (high_included and value == high)):
    left, right = "[" if low_included else "(", "]" if high_included else ")"
    raise InputError(f"{name}={value} is out of range; expected a number in {left}{low}, {high}{right}.")
