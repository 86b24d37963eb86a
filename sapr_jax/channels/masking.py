"""The dense network that behaves as the sub-network: its channels are gated, and all keep their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from sapr_jax.channels.graph import ChannelGraph, Masks, Member, check_masks
from sapr_jax.channels.surgery import Tree, map_members

_OPERATIONS = ("dot_general", "dot_general_cls", "conv_general_dilated", "conv_general_dilated_cls")
"""Fields of layers that put another operation in place of the linear one, as for quantization."""


def mask_params(params: Tree, graph: ChannelGraph, masks: Masks) -> Tree:
  """Returns the parameters with which the dense network behaves as the sub-network.

  A group's mask multiplies the input axis of the kernels that read it. That gates the feature map exactly and asks
  nothing of the normalizations, biases and activations in between; gradients flow to the masks likewise.

  Args:
    params: Parameters of the dense network.
    graph: Its channel graph.
    masks: Group name -> array `[group.size]`; 1 keeps. May be traced, and fractional.

  Raises:
    InputError: If `masks` or `params` does not fit `graph`.
  """
  check_masks(graph, masks)

  def mask(leaf: Any, members: Sequence[tuple[str, Member]]) -> Any:
    for name, member in members:
      if member.role == "in":
        leaf = jnp.asarray(leaf)
        leaf = leaf * member.along_axis(jnp.asarray(masks[name]), 1).astype(leaf.dtype)
    return leaf

  return map_members(mask, params, graph)


def masked_apply(
  model: nn.Module, variables: Mapping[str, Any], graph: ChannelGraph, masks: Masks, *args: Any, **kwargs: Any
) -> Any:
  """Runs the dense network as the sub-network, so that gradients to the masks cost little.

  The same as `model.apply` with the parameters of `mask_params`. Through masked kernels, though, the gradient to the
  masks takes the gradient of every kernel, a third of a training step. So where a plain `nn.Conv` or `nn.Dense` reads a
  group, its input is masked in place of its kernel.

  Args:
    model: The dense network.
    variables: Its variables, all collections.
    graph: Its channel graph.
    masks: Group name -> array `[group.size]`; 1 keeps. May be traced, and fractional.
    *args: Of the network.
    **kwargs: Of the network, or of `flax.linen.Module.apply`.

  Returns:
    What `model.apply` returns.

  Raises:
    InputError: If `masks` or the parameters do not fit `graph`.
  """
  full: Any = variables.get("params") if isinstance(variables, Mapping) else None
  masked: Any = mask_params(full, graph, masks)
  members = graph.members_by_variable("params")

  def gate(next_fun, args, kwargs, context):
    layer = context.module
    path = (*layer.path, "kernel")
    if context.method_name != "__call__" or len(args) != 1 or kwargs or path not in members or not _is_plain(layer):
      return next_fun(*args, **kwargs)
    own = dict(layer.variables["params"])
    if own["kernel"] is not _leaf(masked, path):  # a wrapper changed it, or this is a program within the program
      return next_fun(*args, **kwargs)
    if own["kernel"].shape[-1] != layer.features:  # a NarrowModule has yet to give the layer its width
      return next_fun(*args, **kwargs)
    x = args[0]
    for name, member in members[path]:
      if member.role == "in":
        x = x * member.along_axis(jnp.asarray(masks[name]), 1).reshape(-1).astype(x.dtype)
    return layer.clone(parent=None, name=None).apply({"params": own | {"kernel": _leaf(full, path)}}, x)

  with nn.intercept_methods(gate):
    return model.apply({**variables, "params": masked}, *args, **kwargs)


def _is_plain(layer: nn.Module) -> bool:
  """Whether the layer is linear in its input, and the input's last axis is the input axis of its kernel."""
  if type(layer) is not nn.Dense and not (type(layer) is nn.Conv and layer.feature_group_count == 1):
    return False
  own_operation = any(getattr(layer, name, None) is not None for name in _OPERATIONS)
  return not own_operation and getattr(layer, "promote_dtype", promote_dtype) is promote_dtype


def _leaf(tree: Any, path: Sequence[str]) -> Any:
  for name in path:
    tree = tree[name]
  return tree


__all__ = ["mask_params", "masked_apply"]
