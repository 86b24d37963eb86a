"""The front end for Flax NNX: a module holds its variables, and the fields of its layers are set by their shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from sapr_jax.channels.call import Call
from sapr_jax.channels.graph import ChannelGraph, Masks
from sapr_jax.channels.program import FrontEnd, Program
from sapr_jax.channels.pruning import cut
from sapr_jax.channels.trees import abstract, check_variables, path_of
from sapr_jax.errors import InputError, one_line

_COLLECTIONS = {nnx.Param: "params", nnx.BatchStat: "batch_stats"}


def variables_of(module: nnx.Module) -> dict[str, Any]:
  """Returns the variables of a module as those of linen: collection -> names on the way -> array.

  `nnx.Param` is in "params" and `nnx.BatchStat` in "batch_stats"; other variables are in a collection with the name of
  their type in lower case, such as "rngkey". A variable that the module holds twice is there once, as in `nnx.state`.
  Variables that hold no array, such as a number, are not among them.
  """
  variables: dict[str, Any] = {"params": {}}
  for place, variable in jax.tree_util.tree_leaves_with_path(nnx.state(module), is_leaf=_is_variable):
    kinds = (name for kind, name in _COLLECTIONS.items() if isinstance(variable, kind))
    collection = next(kinds, type(variable).__name__.lower())
    for rest, leaf in jax.tree_util.tree_leaves_with_path(variable):
      if not isinstance(leaf, np.ndarray | jax.Array):
        continue
      *names, last = path_of((*place, *rest))
      tree = variables.setdefault(collection, {})
      for name in names:
        tree = tree.setdefault(name, {})
      tree[last] = leaf
  return variables


def with_variables(module: nnx.Module, variables: Mapping[str, Any]) -> nnx.Module:
  """Returns a copy of a module with other arrays in its variables; the fields of its layers follow their shapes."""
  values = {path_of(place)[1:]: leaf for place, leaf in jax.tree_util.tree_leaves_with_path(dict(variables))}
  graphdef, state = nnx.split(module)
  copy = nnx.merge(
    graphdef, jax.tree_util.tree_map_with_path(lambda place, leaf: values.get(path_of(place), leaf), state)
  )
  for _, layer in nnx.iter_graph(copy):
    for name, size in _sizes(layer).items():
      setattr(layer, name, size)
  return copy


def _is_variable(node: Any) -> bool:
  return isinstance(node, nnx.Variable)


def _sizes(layer: Any) -> dict[str, Any]:
  """Returns the fields of one of Flax's layers that hold sizes, as its variables have them.

  Axes are counted from the last one: variables of layers that `nnx.vmap` stacked have more in front.
  """
  match layer:
    case nnx.Linear():
      in_features, out_features = layer.kernel.shape[-2:]
      return {"in_features": in_features, "out_features": out_features}
    case nnx.LinearGeneral():
      sizes, n_out = layer.kernel.shape, len(layer.out_features)
      return {
        "in_features": sizes[-n_out - len(layer.in_features) : -n_out],
        "out_features": sizes[-n_out:],
      }
    case nnx.Conv():
      return _sizes_of_conv(layer)
    case nnx.ConvTranspose():
      ends = layer.kernel.shape[-2:]
      in_features, out_features = reversed(ends) if layer.transpose_kernel else ends
      return {
        "kernel_shape": _last(layer.kernel, layer.kernel_shape),
        "in_features": in_features,
        "out_features": out_features,
      }
    case nnx.Einsum():
      bias = {} if layer.bias_shape is None else {"bias_shape": _last(layer.bias, layer.bias_shape)}
      return {"kernel_shape": _last(layer.kernel, layer.kernel_shape), **bias}
    case nnx.Embed():
      num_embeddings, features = layer.embedding.shape[-2:]
      return {"num_embeddings": num_embeddings, "features": features}
    case nnx.BatchNorm() | nnx.LayerNorm() | nnx.RMSNorm() | nnx.GroupNorm() | nnx.InstanceNorm():
      return _sizes_of_norm(layer)
    case nnx.MultiHeadAttention():
      return _sizes_of_attention(layer)
  return {}


def _last(variable: Any, dense: Sequence[int]) -> tuple[int, ...]:
  return tuple(variable.shape[len(variable.shape) - len(dense) :])


def _sizes_of_conv(layer: nnx.Conv) -> dict[str, Any]:
  *_, in_features, out_features = layer.kernel.shape
  groups = layer.feature_group_count
  if groups > 1 and groups == layer.in_features:  # depthwise: as many outputs for each input as before
    groups = out_features * groups // layer.out_features
  return {
    "kernel_shape": _last(layer.kernel, layer.kernel_shape),
    "in_features": in_features * groups,
    "out_features": out_features,
    "feature_group_count": groups,
  }


def _sizes_of_norm(layer: Any) -> dict[str, Any]:
  held = [variable for name in ("scale", "bias", "mean") if (variable := getattr(layer, name, None)) is not None]
  if not held:
    return {}
  num_features = held[0].shape[-1]
  groups = {"num_groups": num_features // layer.group_size} if isinstance(layer, nnx.GroupNorm) else {}
  return {"num_features": num_features, **groups}


def _sizes_of_attention(layer: nnx.MultiHeadAttention) -> dict[str, Any]:
  in_features, num_heads, head_dim = layer.query.kernel.shape[-3:]
  in_kv_features, num_kv_heads, _ = layer.key.kernel.shape[-3:]
  return {
    "in_features": in_features,
    "in_kv_features": in_kv_features,
    "out_features": layer.out.kernel.shape[-1],
    "qkv_features": num_heads * head_dim,
    "num_heads": num_heads,
    "num_kv_heads": num_kv_heads,
    "head_dim": head_dim,
  }


def prune_module(module: nnx.Module, graph: ChannelGraph, masks: Masks) -> nnx.Module:
  """Returns the small module; see `sapr_jax.channels.prune`."""
  _, variables = cut(NNX, module, variables_of(module), graph, masks)
  return with_variables(module, variables)


def _apply(module: nnx.Module, variables: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
  """Runs a copy of the module in evaluation mode."""
  copy: Any = with_variables(module, variables)
  copy.eval()
  return copy(*args, **kwargs)


def _trace(module: nnx.Module, variables: Mapping[str, Any], call: Call) -> Program:
  def run(variables: Any, *arrays: Any) -> Any:
    args, kwargs = call.filled(arrays)
    return _apply(module, variables, args, kwargs)

  check_variables(variables)
  leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
  features = {path_of(place)[:-1]: leaf.shape[-1] for place, leaf in leaves if len(leaf.shape) > 1}
  with _errors_of_module(call):
    return Program(jax.make_jaxpr(run)(abstract(dict(variables)), *call.arrays), features)


@contextlib.contextmanager
def _errors_of_module(call: Call) -> Iterator[None]:
  """Turns what a module raises into an `InputError`. It may be anything, as the module's code is the user's."""
  try:
    yield
  except Exception as error:
    reason = one_line(error, 500).partition(" (https://")[0].rstrip(".") or type(error).__name__
    raise InputError(
      f"The module and the inputs ({call}) do not fit together: {reason}. Pass what module(...) takes in evaluation."
    ) from error


def _narrow(module: nnx.Module, graph: ChannelGraph, masks: Masks) -> nnx.Module:
  """Returns the module as it is: it follows the shapes of its variables."""
  del graph, masks
  return module


NNX = FrontEnd(_trace, _narrow)
