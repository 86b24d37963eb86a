"""What a run takes over from the saved network that it starts from: how images become its inputs.

A network that gets images normalized otherwise than in its training is no error that anything would notice: it is
right on 11 % of them instead of 44 %, and fine-tuning has to repair it first. So a run takes the network's mean and
deviation unless its configuration has some, and refuses others.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from sapr_jax import artifacts
from sapr_jax.checks import shown
from sapr_jax.data import Inputs
from sapr_jax.errors import InputError
from sapr_jax.runtime import say

_SAME = 0.5 / 255
"""Half a gray level: means and deviations that differ by less are those of one set of images."""


def inputs_of_weights(config: Any) -> Inputs | None:
  """Returns the inputs of the saved model that `init.weights` names; None if it names none, or they are not known."""
  path = config.init.weights
  return artifacts.load_info(path).inputs if path is not None and pathlib.Path(path).is_dir() else None


def with_inputs(config: Any, inputs: Inputs) -> Any:
  """Returns a copy of the configuration in which unset fields of `data` are those of the inputs.

  Raises:
    InputError: If `data.mean` and `data.std` are set and differ. A run on purpose with others starts from a model that
      was saved without its inputs, as the message says.
  """
  config = config.copy_and_resolve_references()
  fields, path = config.data, config.init.weights
  if inputs.mean is not None and inputs.std is not None:
    if fields.mean is None:
      fields.mean, fields.std = inputs.mean, inputs.std
      numbers = f"mean {_written(inputs.mean)}, deviation {_written(inputs.std)}"
      say(f"images are normalized as for the network in {path}: {numbers}")
    elif not (_are_near(fields.mean, inputs.mean) and _are_near(fields.std, inputs.std)):
      raise InputError(
        f"data.mean and data.std must be those of the network in {path}, {_written(inputs.mean)} and"
        f" {_written(inputs.std)}, got {_written(fields.mean)} and {_written(fields.std)}; leave them unset to take the"
        f" network's, or start from a copy without its inputs: sapr_jax.save('COPY', *sapr_jax.load({path!r}))."
      )
  if fields.stream and inputs.resize is not None:
    if fields.image_size is None:
      fields.image_size = inputs.shape[0]
    if fields.eval_resize is None and fields.image_size == inputs.shape[0]:
      fields.eval_resize = inputs.resize
  return config


def compare_images(inputs: Inputs, found: Inputs, path: str) -> None:
  """Compares the inputs of a network with those that the images of a run make.

  Another size or other classes are no error, as a network may be fine-tuned on them, and only said.

  Raises:
    InputError: If the numbers of channels or classes differ.
  """
  if inputs.shape[-1] != found.shape[-1] or len(inputs.shape) != 3:
    raise InputError(
      f"the images must have the {inputs.shape[-1]} channels that the network in {path} takes, got images of shape"
      f" {found.shape}; give images as it was trained on."
    )
  if inputs.shape != found.shape:
    say(f"warning: the network in {path} was trained on images of shape {inputs.shape}; these have {found.shape}")
  names, now = inputs.class_names, found.class_names
  if names is None or now is None or names == now:
    return
  if len(names) != len(now):
    raise InputError(
      f"the images must have the {len(names)} classes of the network in {path}, got {len(now)}; give images of its"
      " classes."
    )
  if set(names) == set(now):
    what = "has the classes of these images in another order"
  else:
    what = f"was trained on other classes, {shown(names)}, than these, {shown(now)}"
  say(f"warning: the network in {path} {what}; its outputs are learned again")


def _are_near(values: Any, others: Any) -> bool:
  return len(values) == len(others) and bool((np.abs(np.subtract(values, others)) < _SAME).all())


def _written(values: Any) -> str:
  return f"({', '.join(f'{value:.4g}' for value in values)}{',' if len(values) == 1 else ''})"
