"""The front end for Flax NNX: a module holds its variables, and the fields of its layers are set by their shapes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sapr_jax.channels.call import Call, errors_of_model, is_array
from sapr_jax.channels.dense_program import DenseProgram, grown, program_errors_in_one_line, together
from sapr_jax.channels.graph import ChannelGraph, Masks
from sapr_jax.channels.narrow_program import Cut
from sapr_jax.channels.program import FrontEnd, Program
from sapr_jax.channels.pruning import cut
from sapr_jax.channels.trees import abstract, check_variables, mask_params, path_of
from sapr_jax.errors import InputError

_COLLECTIONS = {nnx.Param: "params", nnx.BatchStat: "batch_stats"}


def check_is_module(module: Any) -> None:
  """Raises `InputError` for another object of NNX, such as an optimizer."""
  if not isinstance(module, nnx.Module):
    raise InputError(f"model must be a module, got NNX's {type(module).__name__}; pass the module itself.")


def variables_of(module: nnx.Module) -> dict[str, Any]:
  """Returns the variables of a module as those of linen: collection -> names on the way -> array.

  `nnx.Param` is in "params" and `nnx.BatchStat` in "batch_stats"; other variables are in a collection with the name of
  their type in lower case, such as "rngkey", and arrays that are no variables in "arrays". A variable that the module
  holds twice is there once, as in `nnx.state`. Variables that hold no array, such as a number, are not among them.
  """
  variables: dict[str, Any] = {"params": {}}
  for place, variable in jax.tree_util.tree_leaves_with_path(nnx.state(module), is_leaf=_is_variable):
    kinds = (name for kind, name in _COLLECTIONS.items() if isinstance(variable, kind))
    collection = next(kinds, type(variable).__name__.lower() if _is_variable(variable) else "arrays")
    for rest, leaf in jax.tree_util.tree_leaves_with_path(variable):
      if not is_array(leaf):
        continue
      *names, last = path_of((*place, *rest))
      tree = variables.setdefault(collection, {})
      for name in names:
        tree = tree.setdefault(name, {})
      tree[last] = leaf
  return variables


def with_variables(module: nnx.Module, variables: Mapping[str, Any]) -> nnx.Module:
  """Returns a copy of a module with other arrays in its variables; the fields of its layers follow their shapes."""
  values = {path[1:]: leaf for path, leaf in _flat(variables).items()}
  graphdef, state = nnx.split(module)
  copy = nnx.merge(graphdef, _replaced(state, values))
  for _, layer in nnx.iter_graph(copy):
    for name, size in _sizes(layer).items():
      setattr(layer, name, size)
  return copy


def _replaced(state: Any, values: Mapping[tuple[str, ...], Any]) -> Any:
  return jax.tree_util.tree_map_with_path(lambda place, leaf: values.get(path_of(place), leaf), state)


def storable(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the variables with the numbers of random keys in place of the keys, but for abstract ones."""

  def numbers(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if isinstance(leaf, jax.Array) and _is_key(leaf) else leaf

  return jax.tree.map(numbers, dict(variables))


def restored(module: nnx.Module, variables: Mapping[str, Any], cuts: tuple[Cut, ...]) -> nnx.Module:
  """Returns a dense module, concrete or abstract, with what `storable` made of the variables of one cut from it.

  Raises:
    InputError: If it has other variables, or the same with other dtypes or smaller; the message names one.
  """
  own = variables_of(module)
  shapes = _flat(jax.eval_shape(storable, own))
  stored, keys = _flat(variables), {path: leaf for path, leaf in _flat(own).items() if _is_key(leaf)}
  for path in sorted(shapes.keys() | stored.keys()):
    base, found = (_described(leaves.get(path)) for leaves in (shapes, stored))
    if base[1:] != found[1:] or any(n < size for n, size in zip(base[0], found[0], strict=True)):
      names = ["not there" if rank < 0 else f"{dtype}{list(shape)}" for shape, rank, dtype in (found, base)]
      cure = ""
      if path not in stored and isinstance(_flat(own)[path], jax.ShapeDtypeStruct):
        cure = " If it is a number there, which is not saved, give the module itself in place of what eval_shape makes."
      raise InputError(
        f"base must be the dense module: {'/'.join(path)} is {names[1]} in it, {names[0]} in the file.{cure}"
      )
  impls: dict[tuple[str, ...], Any] = {}
  jax.eval_shape(lambda keys: impls.update({path: jax.random.key_impl(key) for path, key in keys.items()}), keys)

  def restore(place: Any, leaf: Any) -> Any:
    impl = impls.get(path_of(place))
    return leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl)

  small = with_cuts(module, cuts) if cuts else module
  return with_variables(small, jax.tree_util.tree_map_with_path(restore, dict(variables)))


def _described(leaf: Any) -> tuple[tuple[int, ...], int, str]:
  return ((), -1, "") if leaf is None else (leaf.shape, len(leaf.shape), leaf.dtype.name)


def _flat(variables: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
  return {path_of(place): leaf for place, leaf in jax.tree_util.tree_leaves_with_path(dict(variables))}


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


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
  small, variables = cut(NNX, module, variables_of(module), graph, masks)
  return with_variables(small, variables)


class NarrowNnx(nnx.Module):
  """A module that evaluates the program of its dense class with the shapes that are left.

  `prune` returns such a module where code holds a width as a number, or computes another from it. Its class is derived
  from that of the dense module, and it has the same attributes, whose variables are narrower. It is trained like any
  module: then its batch statistics and random counts change. Only `__call__` can be run, and each call outside of
  `nnx.jit` traces the dense module again.

  Attributes:
    pruned_axes: Axes of variables that are cut, as `NarrowModule.cuts`.
  """

  pruned_axes: tuple[Cut, ...]

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    def apply(variables: Any, rngs: Any, *args: Any, **kwargs: Any) -> Any:
      given, copy = _flat(variables), with_variables(self, variables)
      results = super(NarrowNnx, copy).__call__(*args, **kwargs)  # type: ignore[misc]
      return results, {path: leaf for path, leaf in _flat(variables_of(copy)).items() if leaf is not given[path]}

    variables = variables_of(self)
    with program_errors_in_one_line():
      dense = DenseProgram(apply, grown(variables, self.pruned_axes), {}, args, kwargs, training=True)
      results, changed = dense.run(variables, self.pruned_axes, {}, args, kwargs)
    nnx.update(self, _replaced(nnx.state(self), {path[1:]: leaf for path, leaf in changed.items()}))
    return results

  def __reduce_ex__(self, protocol: Any) -> Any:
    """Lets a module be pickled: its class has no name in the code, and is derived again."""
    reduced: Any = super().__reduce_ex__(protocol)
    return _new_narrow, (dense_class(self),), *reduced[2:]


@functools.cache
def _narrow_class(dense: type[nnx.Module]) -> type[NarrowNnx]:
  own = [kind for kind in dense.__mro__ if kind is not object and kind.__module__.partition(".")[0] != "flax"]
  methods = {name for kind in own for name, value in vars(kind).items() if inspect.isfunction(value)}
  if others := sorted(name for name in methods if not name.startswith("_")):
    logging.getLogger("sapr_jax").warning(
      "%s holds widths as numbers; pruned, it evaluates the dense program in __call__ alone. Other methods run as they"
      " are written, on narrower arrays, which may be wrong unless they call the module: %s.",
      dense.__name__,
      ", ".join(others),
    )
  about = {"__module__": dense.__module__, "__doc__": NarrowNnx.__doc__}
  return type(f"Narrow{dense.__name__}", (NarrowNnx, dense), about)


def _new_narrow(dense: type[nnx.Module]) -> NarrowNnx:
  narrow = _narrow_class(dense)
  return narrow.__new__(narrow)


def dense_class(module: nnx.Module) -> type[nnx.Module]:
  """Returns the class that the author of a module wrote."""
  return type(module).__bases__[1] if isinstance(module, NarrowNnx) else type(module)


def with_cuts(module: nnx.Module, cuts: tuple[Cut, ...]) -> NarrowNnx:
  """Returns a copy of a module, whose axes may be cut already, that evaluates the dense program with `cuts`."""
  copy: Any = nnx.clone(module)
  copy.__class__ = type(module) if isinstance(module, NarrowNnx) else _narrow_class(type(module))
  copy.pruned_axes = together(getattr(module, "pruned_axes", ()), cuts)
  return copy


def masked_apply(module: nnx.Module, graph: ChannelGraph, masks: Masks, *args: Any, **kwargs: Any) -> Any:
  """Runs a copy of the module as the sub-network, in evaluation mode; see `sapr_jax.channels.masked_apply`."""
  variables = variables_of(module)
  return evaluate(module, variables | {"params": mask_params(variables["params"], graph, masks)}, *args, **kwargs)


def evaluate(module: nnx.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
  """Runs a copy of the module in evaluation mode."""
  return OfVariables(module, lambda copy, *args: copy(*args, **kwargs))(variables, *args)


@dataclasses.dataclass(frozen=True)
class OfVariables:
  """A function of the module as one of its variables, which gets a copy of it in evaluation mode.

  Two of the same module and function are equal, so that `jax.jit` takes one for the other.
  """

  module: nnx.Module
  function: Callable[..., Any]

  def __call__(self, variables: Mapping[str, Any], *args: Any) -> Any:
    copy = with_variables(self.module, variables)
    copy.eval()
    return self.function(copy, *args)


def statistics_after(
  module: nnx.Module, renew: Callable[[Any, Any], Any], variables: Mapping[str, Any], batch: Any
) -> dict[str, Any]:
  """Returns what `renew(copy, batch)` leaves in the variables that are no parameters, of a copy in training mode."""
  copy = with_variables(module, variables)
  copy.train()
  renew(copy, batch)
  return {collection: tree for collection, tree in variables_of(copy).items() if collection != "params"}


def _trace(module: nnx.Module, variables: Mapping[str, Any], call: Call) -> Program:
  def run(variables: Any, *arrays: Any) -> Any:
    args, kwargs = call.filled(arrays)
    return evaluate(module, variables, *args, **kwargs)

  check_variables(variables)
  leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
  features = {path_of(place)[:-1]: leaf.shape[-1] for place, leaf in leaves if len(leaf.shape) > 1}
  with errors_of_model(f"The module and the inputs ({call})", cure="Pass what module(...) takes in evaluation"):
    return Program(jax.make_jaxpr(run)(abstract(dict(variables)), *call.arrays), features)


def _narrow(module: nnx.Module, graph: ChannelGraph, masks: Masks) -> nnx.Module | None:
  """Returns the module as it is: it follows the shapes of its variables."""
  del graph, masks
  return None if isinstance(module, NarrowNnx) else module


NNX = FrontEnd(_trace, _narrow, with_cuts)
