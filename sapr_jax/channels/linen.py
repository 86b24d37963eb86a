"""The front end for Flax linen: everything in `channels` that knows what a linen module is."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from sapr_jax.channels.call import Call, errors_of_model
from sapr_jax.channels.dense_program import together
from sapr_jax.channels.graph import ChannelGraph, Masks
from sapr_jax.channels.narrow_module import NarrowModule, check_module
from sapr_jax.channels.narrow_program import Cut
from sapr_jax.channels.program import FrontEnd, Program
from sapr_jax.channels.trees import abstract, check_variables, kept_entries, mask_params
from sapr_jax.checks import is_integer

_OPERATIONS = ("dot_general", "dot_general_cls", "conv_general_dilated", "conv_general_dilated_cls")
"""Fields of layers that put another operation in place of the linear one, as for quantization."""


def masked_apply(
  model: nn.Module, variables: Mapping[str, Any], graph: ChannelGraph, masks: Masks, *args: Any, **kwargs: Any
) -> Any:
  """Runs the dense network as the sub-network; see `sapr_jax.channels.masked_apply`."""
  check_module(model)
  check_variables(variables)
  full = variables.get("params")
  masked: Any = mask_params(full, graph, masks)
  members = graph.members_by_variable("params")

  def gate(next_fun, args, kwargs, context):
    layer = context.module
    path = (*layer.path, "kernel")
    if context.method_name != "__call__" or len(args) != 1 or kwargs or path not in members or not _is_plain(layer):
      return next_fun(*args, **kwargs)
    own, member = dict(layer.variables["params"]), members[path][0][1]
    is_changed = own["kernel"] is not member.get(masked)  # by a wrapper, or this is a program within the program
    if is_changed or own["kernel"].shape[-1] != layer.features:  # a NarrowModule has yet to narrow the layer
      return next_fun(*args, **kwargs)
    x = args[0]
    for name, member in members[path]:
      if member.role == "in":
        # In float32 at least, as the gradient to the mask is a sum over all positions.
        wide = jnp.float32 if x.dtype.itemsize < 4 else x.dtype
        entries = member.along_axis(jnp.asarray(masks[name]), 1).reshape(-1)
        x = (x.astype(wide) * entries.astype(wide)).astype(x.dtype)
    return layer.clone(parent=None, name=None).apply({"params": own | {"kernel": member.get(full)}}, x)

  with errors_of_model("model, variables and inputs", flax.errors.FlaxError), nn.intercept_methods(gate):
    return model.apply({**variables, "params": masked}, *args, **kwargs)


def _is_plain(layer: nn.Module) -> bool:
  """Returns whether the layer is linear in its input, and the input's last axis is the input axis of its kernel."""
  if type(layer) is not nn.Dense and not (type(layer) is nn.Conv and layer.feature_group_count == 1):
    return False
  own_operation = any(getattr(layer, name, None) is not None for name in _OPERATIONS)
  return not own_operation and getattr(layer, "promote_dtype", promote_dtype) is promote_dtype


_MODES = {"train": False, "training": False, "is_training": False, "deterministic": True}
"""Arguments by which modules are told, by custom, that they are evaluated."""


def evaluation_kwargs(model: nn.Module) -> dict[str, Any]:
  """Returns the arguments that tell a module that it is evaluated, as far as its `__call__` has one of the usual names.

  Example:
    >>> evaluation_kwargs(nn.Dropout(0.5))
    {'deterministic': True}
  """
  base = model.base if isinstance(model, NarrowModule) else model
  parameters = inspect.signature(type(base).__call__).parameters if callable(base) else {}
  return {name: value for name, value in _MODES.items() if name in parameters}


def dense_features(model: nn.Module, inputs: jax.ShapeDtypeStruct) -> dict[str, int]:
  """Returns path of a layer -> its field `features`, in a module or in the one that a `NarrowModule` was cut from.

  Nothing is computed. It is empty where the module's own code cannot be run on `inputs` alone.
  """
  base = model.base if isinstance(model, NarrowModule) else model
  found: dict[str, int] = {}

  def note(next_fun, args, kwargs, context):
    features: Any = getattr(context.module, "features", None)
    if is_integer(features):
      found["/".join(context.module.path)] = int(features)
    return next_fun(*args, **kwargs)

  with contextlib.suppress(Exception), nn.intercept_methods(note):
    jax.eval_shape(lambda x: base.init(jax.random.key(0), x, **evaluation_kwargs(base)), inputs)
    return found
  return {}


def _narrow(model: nn.Module, graph: ChannelGraph, masks: Masks) -> NarrowModule | None:
  """Returns the module with the widths that `masks` leaves, if it takes them from fields."""
  if isinstance(model, NarrowModule) and model.cuts:
    return None
  keep = kept_entries(graph, masks)
  base, widths = (model.base, {p: dict(f) for p, f in model.widths}) if isinstance(model, NarrowModule) else (model, {})
  for path, layer in graph.layers.items():
    kernel = ("params", *layer.kernel)
    entries = keep.get(kernel, {}).get(layer.out_axis)
    if entries is None or entries.size == graph.shapes[kernel][layer.out_axis]:
      continue
    fields = {"features": int(entries.size)}
    if layer.multiplier is not None:
      fields["feature_group_count"] = int(entries.size) // layer.multiplier
    widths["/".join(path)] = fields
  return NarrowModule(base, tuple((path, tuple(sorted(fields.items()))) for path, fields in sorted(widths.items())))


def _trace(model: nn.Module, variables: Mapping[str, Any], call: Call) -> Program:
  """Traces `model.apply`, and notes the field `features` of its modules."""
  features: dict[tuple[str, ...], int] = {}

  def note_features(next_fun, args, kwargs, context):
    value = getattr(context.module, "features", None)
    if isinstance(value, int):
      features[context.module.path] = value
    return next_fun(*args, **kwargs)

  def apply(variables, *arrays):
    args, kwargs = call.filled(arrays)
    with nn.intercept_methods(note_features):
      return model.apply(variables, *args, **kwargs)

  check_module(model)
  check_variables(variables)
  with errors_of_model(f"The model, its variables and the inputs ({call})"):
    return Program(jax.make_jaxpr(apply)(abstract(dict(variables)), *call.arrays), features)


def _program(model: nn.Module, cuts: tuple[Cut, ...]) -> NarrowModule:
  """Returns the module that evaluates the program of `model` with axes cut."""
  if not isinstance(model, NarrowModule):
    return NarrowModule(model, (), cuts)
  return NarrowModule(model.base, model.widths, together(model.cuts, cuts))


LINEN = FrontEnd(_trace, _narrow, _program)
