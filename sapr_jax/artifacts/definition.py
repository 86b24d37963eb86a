"""Module of a saved model as JSON: its class and fields, and what of it is narrower. Weights are not part of it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from sapr_jax import models
from sapr_jax.channels import NarrowModule, check_module, is_nnx
from sapr_jax.checks import shown
from sapr_jax.errors import InputError, one_line

DEFINITION = "model.json"
NNX = "nnx"
_SCALARS = (bool, int, float, str)


def definition_of(model: Any) -> dict[str, Any]:
  """Returns what the class of a model does not say. The fields of layers of NNX follow the shapes of the variables."""
  if is_nnx(model):
    from sapr_jax.channels.nnx import NarrowNnx, dense_class  # takes a while to import

    definition = {"library": NNX, "base": {"class": dense_class(model).__name__, "fields": {}}, "widths": {}}
    return definition | ({"cuts": model.pruned_axes} if isinstance(model, NarrowNnx) else {})
  pruned = model if isinstance(model, NarrowModule) else NarrowModule(model)
  base = {"class": type(pruned.base).__name__, "fields": fields_to_json(pruned.base)}
  widths = {layer: dict(fields) for layer, fields in pruned.widths}
  return {"base": base, "widths": widths, **({"cuts": pruned.cuts} if pruned.cuts else {})}


def check_base(base: Any, description: Mapping[str, Any], path: pathlib.Path, is_module: bool) -> None:
  """Checks that `base` is the module that was saved, as far as its definition tells; `is_module` if one of NNX."""
  if is_module and not is_nnx(base):
    name = description["class"][:100]
    raise InputError(f"{path} holds a {name} of NNX; give the dense module: load(path, base={name}(rngs=nnx.Rngs(0))).")
  if not is_module:
    check_module(base)
  kind = type(base).__name__
  if kind != description["class"]:
    raise InputError(f"{path} holds a {description['class'][:100]}; base is a {kind}.")
  if is_module:  # the variables tell
    return
  fields = json.loads(json.dumps(fields_to_json(base)))  # as they come from a file
  for name, value in description["fields"].items():
    found = fields.get(name)
    # Text stands for values that JSON cannot hold; it may differ from one process to the next. `remat` and dtypes may
    # differ, as they change the computation and not the variables.
    if found != value and name != "remat" and not (isinstance(value, dict) and {"repr", "dtype"} & value.keys()):
      raise InputError(f"{path} holds a {kind} with {name[:100]}={shown(value)}; base has {name[:100]}={shown(found)}.")


def fields_to_json(module: nn.Module) -> dict[str, Any]:
  """Returns the fields of a module that JSON can hold. Others are written as their repr, for people to read."""
  names = [field.name for field in dataclasses.fields(module) if field.name not in ("parent", "name")]
  return {name: _to_json(getattr(module, name)) for name in names}


def _to_json(value: Any) -> Any:
  if value is None or (isinstance(value, _SCALARS) and repr(value) not in ("nan", "inf", "-inf")):
    return value
  if isinstance(value, tuple | list):
    return {"tuple": [v if isinstance(v, _SCALARS) else repr(v) for v in value]}
  try:
    return {"dtype": jnp.dtype(value).name}
  except TypeError:
    return {"repr": repr(value)}


def base_from_json(description: Mapping[str, Any], path: pathlib.Path) -> nn.Module:
  name = description["class"]
  if name not in models.CLASSES:
    raise InputError(
      f"{path} holds a {name[:100]}, which is not a model of this package; give the module:"
      f" load(path, base={name[:100]}(...))."
    )
  fields = {}
  try:
    for field, value in description["fields"].items():
      if isinstance(value, dict):
        value = tuple(value["tuple"]) if "tuple" in value else jnp.dtype(value["dtype"]) if "dtype" in value else None
      fields[field] = value
    return models.CLASSES[name](**fields)
  except Exception as error:  # a field of Flax's own may make it fail in any way
    raise InputError(
      f"{path / DEFINITION}: {name} does not take the fields {shown(sorted(fields))} ({one_line(error, 200)})."
    ) from None
