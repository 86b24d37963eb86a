"""Networks that a command is given: saved ones, and those of this package by their name."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import types
from typing import TYPE_CHECKING, Any

from sapr_jax.errors import InputError

if TYPE_CHECKING:
  import flax.linen as nn

  from sapr_jax.artifacts import ModelInfo
  from sapr_jax.data import Inputs


@dataclasses.dataclass(frozen=True)
class SavedNetwork:
  """A saved model; `inputs` are its own, or of the shape that the command was given."""

  model: nn.Module
  variables: dict[str, Any]
  inputs: Inputs
  info: ModelInfo


def shape(text: str) -> tuple[int, ...]:
  """Returns the sizes that `HEIGHTxWIDTHxCHANNELS` names, for argparse."""
  parts = text.lower().split("x")
  if not all(part.isdecimal() and 0 < int(part) < 2**31 for part in parts):
    raise argparse.ArgumentTypeError(f"must be sizes such as 32x32x3, got {text!r}")
  return tuple(map(int, parts))


def add_patterns(parser: argparse._ActionsContainer) -> None:
  for name, help in (("include", "only groups in these"), ("exclude", "no groups in these")):
    parser.add_argument(f"--{name}", nargs="+", metavar="GLOB", help=f"{help} modules, such as 'stage1*' or '*/conv2'")


def chosen_groups(args: argparse.Namespace, of_run: Any = types.MappingProxyType({})) -> dict[str, Any]:
  """Returns which groups `trace_channels` is to offer: as the command says, or else the fields of a run."""
  default = {"select": "blocks", "include": (), "exclude": ()}
  return {name: getattr(args, name) or of_run.get(name) or value for name, value in default.items()}


def add_shape(parser: argparse.ArgumentParser, when: str) -> None:
  parser.add_argument("--input-shape", type=shape, metavar="HxWxC", help=f"one input, such as 224x224x3; needed {when}")


def open_saved(path: str, input_shape: tuple[int, ...] | None = None) -> SavedNetwork:
  """Reads a saved model.

  Raises:
    InputError: If it cannot be read, or neither it nor `input_shape` says what it takes.
  """
  from sapr_jax import artifacts
  from sapr_jax.data import Inputs

  info = artifacts.load_info(path)
  inputs = info.inputs
  if inputs is None and input_shape is None:
    raise InputError(f"{path} was saved without its inputs; add --input-shape, such as --input-shape 32x32x3.")
  if inputs is not None and input_shape not in (None, inputs.shape):
    raise InputError(f"--input-shape must be left out, as {path} was saved with {written(inputs.shape)}.")
  if inputs is None:
    assert input_shape is not None
    inputs = Inputs(input_shape)
  model, variables = artifacts.load(path)
  return SavedNetwork(model, variables, inputs, info)


def written(sizes: Any) -> str:
  """Returns a shape as `--input-shape` takes it: `32x32x3`."""
  return "x".join(map(str, sizes))


def usual_shape(model: Any) -> tuple[int, ...]:
  """Returns the shape of images that a network of this package is made for, without the batch."""
  from sapr_jax.models import CifarResNet

  return (32, 32, 3) if isinstance(model, CifarResNet) or getattr(model, "small_images", False) else (224, 224, 3)


def abstract_variables(model: Any, input_shape: tuple[int, ...]) -> Any:
  """Returns the shapes of the variables of a network; nothing is computed."""
  import jax
  import jax.numpy as jnp

  from sapr_jax.channels import errors_of_model

  with errors_of_model(f"The network and an input of {written(input_shape)}"):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *input_shape)))


def name_of(base: Any) -> str:
  """Returns the name in `models.MODELS` of a network, whatever its classes and width.

  Raises:
    InputError: If it has none, so that a configuration cannot name it.
  """
  from sapr_jax import models

  fields = ("num_classes", "width_multiplier", "dtype", "remat")
  for name in models.MODELS:
    made = models.create(name)
    if type(made) is type(base) and made.clone(**{field: getattr(base, field) for field in fields}) == base:
      return name
  raise InputError(
    f"the network must be one of {', '.join(models.MODELS)} to be fine-tuned by this command, got a"
    f" {type(base).__name__} of other fields; see docs/own_model.md."
  )


def check_place(out: str, given: str) -> pathlib.Path:
  """Returns the path of a model that is to be saved; what would be refused at the end is refused now."""
  path = pathlib.Path(out)
  if os.path.lexists(path) and not (path / "model.json").is_file():
    raise InputError(f"{out} exists and is not a saved model; name a new directory, or remove it.")
  if path.exists() and os.path.samefile(path, given):
    raise InputError(f"OUT must be another directory than MODEL, got {out} for both.")
  return path
