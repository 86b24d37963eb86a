"""What is known of a saved model beside its weights: its inputs, what was measured, and the configuration.

It is kept as readable JSON in `info.json`, beside the weights:

    {"format": 1, "inputs": {...}, "metrics": {...}, "config": {...}, "macs": 125485706,
     "widths": {"stage1_block1/conv1": {"dense": 16, "kept": 9}}}

`model.json` has the checksum of that file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax.channels import (
  NarrowModule,
  count_macs,
  dense_features,
  errors_of_model,
  evaluate,
  evaluation_kwargs,
  is_nnx,
)
from sapr_jax.checks import check_type, is_integer, shown
from sapr_jax.data import Inputs
from sapr_jax.errors import InputError, one_line

INFO = "info.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class ModelInfo:
  """What is known of a saved model, beside its weights.

  Attributes:
    module: Name of the class of its module; of the base, if it was pruned.
    inputs: What it takes; None if that was not saved.
    metrics: What was measured: "accuracy" in [0, 1], "loss", "macs", "params", "latency_ms" (batch size ->
      milliseconds), "images" (on how many), "device" (where), and whatever else was given. Of the pruned network of a
      run also "dense" and "subnetwork", with the same of these.
    config: How it was made; of a run, name of a field with dots -> value.
    macs: Multiply-accumulates for one input; None if its inputs were not saved.
    params: Number of trainable parameters.
    widths: Path of a pruned layer -> (features or heads in the dense network, those kept). The first is None if it is
      not known.
  """

  module: str
  inputs: Inputs | None
  metrics: dict[str, Any]
  config: dict[str, Any]
  macs: int | None
  params: int
  widths: dict[str, tuple[int | None, int]]


def info_to_json(
  model: Any, variables: Mapping[str, Any], inputs: Inputs | None, metrics: Any, config: Any
) -> dict[str, Any]:
  """Returns the content of `info.json`, after checking that the inputs fit the model.

  Raises:
    InputError: If they do not, or metrics or configuration hold what JSON cannot.
  """
  widths = {layer: dict(fields) for layer, fields in model.widths} if isinstance(model, NarrowModule) else {}
  macs, dense = None, dict[str, int]()
  if inputs is not None:
    check_type("inputs", inputs, Inputs, "sapr_jax.Inputs(shape, mean=..., std=...) makes them")
    macs = _count(model, variables, inputs)
    dense = dense_features(model, abstract(inputs)) if widths else {}
  return {
    "format": FORMAT,
    "inputs": None if inputs is None else inputs.to_json(),
    "metrics": _plain("metrics", metrics),
    "config": _plain("config", config),
    "macs": macs,
    "widths": {
      layer: {"dense": dense.get(layer), "kept": fields["features"]}
      for layer, fields in widths.items()
      if "features" in fields
    },
  }


def abstract(inputs: Inputs) -> jax.ShapeDtypeStruct:
  """Returns one input in a batch, without its values."""
  return jax.ShapeDtypeStruct(inputs.input_shape, jnp.dtype(inputs.dtype))


def _count(model: Any, variables: Mapping[str, Any], inputs: Inputs) -> int:
  """Runs the model abstractly on such inputs, and counts its multiply-accumulates."""
  kwargs = {} if is_nnx(model) else evaluation_kwargs(model)
  with errors_of_model(f"The model, its variables and inputs of shape {inputs.input_shape}"):
    outputs = jax.eval_shape(lambda x: evaluate(model, variables, x, **kwargs), abstract(inputs))
  names = inputs.class_names
  if names is not None and isinstance(outputs, jax.ShapeDtypeStruct) and outputs.shape[-1:] != (len(names),):
    raise InputError(
      f"class_names must name the {outputs.shape[-1:][0] if outputs.shape else 0} outputs of the model, got"
      f" {len(names)}: {shown(names)}."
    )
  given = None if is_nnx(model) else variables
  return count_macs(model, given, inputs.input_shape, apply_kwargs=kwargs, input_dtype=inputs.dtype)


def _plain(name: str, value: Any) -> dict[str, Any]:
  """Returns a mapping, a ConfigDict or a dataclass as plain JSON data."""
  if value is None:
    return {}
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    value = _fields(value)
  elif not isinstance(value, Mapping) and callable(getattr(value, "to_dict", None)) and not isinstance(value, type):
    value = value.to_dict()
  if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
    raise InputError(f"{name} must map names to values, such as {{'accuracy': 0.9}}, got {shown(value)}.")
  try:
    plain = json.loads(json.dumps(dict(value), default=_as_json, allow_nan=False))
  except (TypeError, ValueError, RecursionError) as error:
    raise InputError(
      f"{name} must hold finite numbers, text, and lists and mappings of these, got {shown(value)}"
      f" ({one_line(error, 120)})."
    ) from None
  return dict(plain)


def _as_json(value: Any) -> Any:
  """Returns as JSON's own what is not: numbers and arrays of NumPy and JAX, other mappings, dataclasses."""
  if isinstance(value, np.generic | np.ndarray) or (
    isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer)
  ):
    return np.asarray(value).tolist()
  if isinstance(value, Mapping):
    return dict(value)
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return _fields(value)
  raise TypeError(f"a {type(value).__name__} is none")


def _fields(value: Any) -> dict[str, Any]:
  return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}


def _widths_of_cuts(definition: Mapping[str, Any]) -> dict[str, tuple[int | None, int]]:
  """Returns the widths of the layers whose kernels were cut along an axis of their outputs."""
  shapes = {name: entry["shape"] for name, entry in definition["variables"].items()}
  found: dict[str, tuple[int | None, int]] = {}
  for name, axis, size, _ in definition.get("cuts", ()):
    shape = shapes.get(name, ())
    is_output = axis == len(shape) - 1 or (len(shape) == 3 and axis == 1)
    if name.startswith("params/") and len(shape) > 1 and axis > 0 and is_output:
      found.setdefault(name.removeprefix("params/").rpartition("/")[0], (size, shape[axis]))
  return found


def info_from_json(document: Any, definition: Mapping[str, Any]) -> ModelInfo:
  """Returns what `info.json` (None if there is none) and `model.json` say; raises `InputError` if they cannot be."""
  layers = {layer: fields["features"] for layer, fields in definition["widths"].items() if "features" in fields}
  cut = _widths_of_cuts(definition)
  # A model without parameters has none in its definition either.
  params = sum(
    int(np.prod(entry["shape"], dtype=np.int64))
    for name, entry in definition["variables"].items()
    if name.startswith("params/")
  )
  module = definition["base"]["class"]
  if document is None:
    return ModelInfo(module, None, {}, {}, None, params, cut | {layer: (None, kept) for layer, kept in layers.items()})
  if not isinstance(document, dict) or document.get("format") != FORMAT:
    version = document.get("format") if isinstance(document, dict) else None
    raise InputError(f"it has format {shown(version)}; this version reads format {FORMAT}.")
  inputs, macs = document.get("inputs"), document.get("macs")
  parts: Any = [document.get(name) for name in ("metrics", "config", "widths")]
  if not all(isinstance(part, dict) for part in parts) or not (macs is None or is_integer(macs)):
    raise InputError("entries are missing or of the wrong kind.")
  metrics, config, widths = parts
  found: dict[str, tuple[int | None, int]] = {**cut}
  for layer, kept in layers.items():
    entry = widths.get(layer)
    dense = entry.get("dense") if isinstance(entry, dict) else None
    found[layer] = (dense if is_integer(dense) else None, kept)
  return ModelInfo(module, None if inputs is None else Inputs.from_json(inputs), metrics, config, macs, params, found)
