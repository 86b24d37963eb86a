"""What can be done with a network, of Flax linen or of Flax NNX: find its channels, count its costs, cut it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import flax.linen as nn
import jax.numpy as jnp

from sapr_jax.channels import linen
from sapr_jax.channels.analysis import interpret
from sapr_jax.channels.call import call_of
from sapr_jax.channels.graph import ChannelGraph, Masks, Selection, check_graph
from sapr_jax.channels.narrow_module import check_module
from sapr_jax.channels.pieces import Piece, pieces_of
from sapr_jax.channels.program import FrontEnd
from sapr_jax.channels.pruning import Dense, check_fit, cut, find_graph
from sapr_jax.channels.readers import Moments, kept_weights, moments_of_call
from sapr_jax.channels.rules import ParamKey
from sapr_jax.channels.selection import Patterns
from sapr_jax.channels.trees import check_variables
from sapr_jax.checks import shown
from sapr_jax.errors import InputError

if TYPE_CHECKING:
  from flax import nnx  # takes a while to import


def trace_channels(
  model: nn.Module | nnx.Module,
  variables: Any = None,
  *args: Any,
  input_shape: Sequence[int] | None = None,
  select: Selection = "blocks",
  include: Patterns = (),
  exclude: Patterns = (),
  apply_kwargs: Mapping[str, Any] | None = None,
  input_dtype: Any = jnp.float32,
  **kwargs: Any,
) -> ChannelGraph:
  """Finds the channels of `model` that can be cut together without changing what is computed from the others.

  `model.apply(variables, *args, **kwargs)` is traced abstractly (nothing is computed, and all arrays may be
  `jax.ShapeDtypeStruct`s). Channels that go through an operation without a rule are fixed: the graph is never
  wrong, at worst less prunable, and `ChannelGraph.explain` gives the reasons.

  Args:
    model: A module of Flax linen, or of Flax NNX.
    variables: Of a linen module: its variables, `{"params": ..., "batch_stats": ...}`. An NNX module holds its own, and
      the inputs follow at once: `trace_channels(module, x)`. A copy of it is traced, after `eval()`.
    *args: What the model is applied to in evaluation mode, any pytrees: `trace_channels(model, variables, tokens)`.
      Costs are those of this call, so a batch of one is best. A tuple of integers alone is taken as `input_shape`.
    input_shape: The short form for images, `[batch, height, width, channels]`; the batch is traced as 1.
    select: Which of the groups that can be cut exactly are offered. "blocks" is the paper's choice: groups inside one
      sub-module and not joined by an addition of two different activations, so neither residual streams nor stem nor
      head. (An addend that is the same at all positions, as an embedding of the time, joins nothing.) "unjoined" drops
      the first condition (a flat VGG needs that), "exact" both. Or a predicate over `ChannelGroup`.
    include: Of those that `select` chooses, only groups with such a name, or in such a module: a glob or several, such
      as "encoder/*"; () for all.
    exclude: Groups, or modules, that are left out, in the same way; it wins over `include`.
    apply_kwargs: Further arguments of `apply`, such as `{"train": False}`; in particular those that have the names of
      arguments of this function.
    input_dtype: Dtype of the array with `input_shape`.
    **kwargs: Further arguments of `apply`: `mask=mask, train=False`, or `rngs` where it needs them.

  Returns:
    The graph of the groups offered.

  Raises:
    InputError: If the variables or the arguments do not fit `model`, `select` is unknown, a pattern matches no group
      that can be cut, or no group is offered; the message says which choice would.

  References:
    Gao et al., ICCV 2023, supplement B: one mask a block, on the output of the upper and the input of the lower layer.
  """
  front_end, variables, args = network_of(model, variables, args)
  call = call_of(args, kwargs, input_shape=input_shape, input_dtype=input_dtype, apply_kwargs=apply_kwargs)
  return find_graph(Dense(front_end, model, variables, call), select, include, exclude)


def count_macs(
  model: nn.Module | nnx.Module,
  variables: Any = None,
  *args: Any,
  input_shape: Sequence[int] | None = None,
  apply_kwargs: Mapping[str, Any] | None = None,
  input_dtype: Any = jnp.float32,
  **kwargs: Any,
) -> int:
  """Counts the multiply-accumulates of all convolutions and matrix products of `model` for one call, or one image.

  Unlike `trace_channels(...).macs()` it also works where nothing can be pruned. Arguments as there.
  """
  front_end, variables, args = network_of(model, variables, args)
  call = call_of(args, kwargs, input_shape=input_shape, input_dtype=input_dtype, apply_kwargs=apply_kwargs)
  _, interpreter = interpret(front_end.trace(model, variables, call), variables, call)
  return sum(contraction.macs for contraction in interpreter.contractions)


def network_pieces(
  model: nn.Module | nnx.Module, variables: Any, graph: ChannelGraph, batch_size: int
) -> tuple[list[Piece], Piece]:
  """Returns the pieces of a network on a batch of `batch_size`, in forward order, and the whole network as one.

  Nothing is computed. `variables` may be abstract; they are None for a module of NNX, which holds its own.

  Raises:
    InputError: If `graph` is not of this model.
  """
  check_graph(graph)
  front_end, variables, _ = network_of(model, variables, ())
  check_variables(variables)
  check_fit(variables, graph)
  call = graph.call.with_batch(batch_size)
  return pieces_of(front_end.trace(model, variables, call), variables, call, graph)


@overload
def prune(model: nnx.Module, graph: ChannelGraph, masks: Masks, /) -> nnx.Module: ...


@overload
def prune(
  model: nn.Module, variables: Mapping[str, Any], graph: ChannelGraph, masks: Masks
) -> tuple[nn.Module, dict[str, Any]]: ...


def prune(model: Any, variables: Any = None, graph: Any = None, masks: Any = None) -> Any:
  """Cuts the dropped channels out of a network.

  The result computes what the masked network computes. This is proved: the small model is traced, and must be the same
  program as the dense one, with the shapes that the masks give. If it is another one, as the model's code does not
  follow the cut (it holds a width as a number, or computes another from it, as in `y * y.shape[-1] ** -0.5`), the small
  model evaluates the program of the dense one with these shapes; see `NarrowModule`.

  Args:
    model: The dense network.
    variables: Its variables, all collections; left out for a module of NNX: `prune(module, graph, masks)`.
    graph: Its channel graph.
    masks: Group name -> 0/1 array `[group.size]`, concrete; 1 keeps.

  Returns:
    (`NarrowModule`, its variables); for a module of NNX a smaller one, of the same class, or of a class derived from it
    that evaluates the program. Nothing in the arguments is changed.

  Raises:
    InputError: If `model`, `variables` or `masks` does not fit `graph`, a mask drops a whole group, or the cut model
      would compute something else; the message names the variable or the group.
  """
  if not is_nnx(model):
    check_module(model)
    return cut(linen.LINEN, model, variables, graph, masks)
  if isinstance(variables, ChannelGraph):
    variables, graph, masks = None, variables, masks if graph is None else graph
  if variables is not None:
    raise InputError(f"graph must be a ChannelGraph in prune(module, graph, masks) of NNX, got {shown(variables)}.")
  from sapr_jax.channels.nnx import prune_module

  return prune_module(model, graph, masks)


@overload
def masked_apply(model: nnx.Module, graph: ChannelGraph, masks: Masks, /, *args: Any, **kwargs: Any) -> Any: ...


@overload
def masked_apply(
  model: nn.Module, variables: Mapping[str, Any], graph: ChannelGraph, masks: Masks, *args: Any, **kwargs: Any
) -> Any: ...


def masked_apply(model: Any, variables: Any, graph: Any = None, masks: Any = None, *args: Any, **kwargs: Any) -> Any:
  """Runs the dense network as the sub-network.

  Equals `model.apply` with the parameters of `mask_params`. There the gradient to the masks needs the gradient of every
  masked kernel, a third of a training step. Here the input of a plain `nn.Conv` or `nn.Dense` of linen is masked
  instead, so that gradients to the masks cost little.

  Args:
    model: The dense network.
    variables: Its variables, all collections; left out for a module of NNX: `masked_apply(module, graph, masks, x)`. A
      copy of it is run, after `eval()`.
    graph: Its channel graph.
    masks: Group name -> array `[group.size]`; 1 keeps. May be traced, and fractional.
    *args: Of the network.
    **kwargs: Of the network, or of `flax.linen.Module.apply`.

  Returns:
    What the network returns.

  Raises:
    InputError: If `masks` or the parameters do not fit `graph`.
  """
  if not is_nnx(model):
    return linen.masked_apply(model, variables, graph, masks, *args, **kwargs)
  if not isinstance(variables, ChannelGraph):
    raise InputError(f"graph must be a ChannelGraph in masked_apply(module, graph, masks, x), got {shown(variables)}.")
  from sapr_jax.channels.nnx import masked_apply as apply_module

  return apply_module(model, variables, graph, *(() if masks is None else (masks, *args)), **kwargs)


def reader_moments(
  model: Any, variables: Mapping[str, Any], graph: ChannelGraph, masks: Masks, batch: Any
) -> dict[ParamKey, Moments]:
  """Returns what kernels see of the channels that stay, and give for those that go, on one batch; it can be compiled.

  Args:
    model: The dense network.
    variables: Its variables, those of NNX as `nnx.variables_of` returns them.
    graph: Its channel graph.
    masks: Group name -> 0/1 array `[group.size]`, with values: no tracers.
    batch: An array, or a tuple of the arrays of `graph.call`.

  Returns:
    Kernel that loses input channels, where it is used in a plain way -> its moments.

  Raises:
    InputError: If something does not fit `graph`.
  """
  check_graph(graph)
  check_fit(variables, graph)
  arrays = graph.call.arrays_of(batch)
  front_end = network_of(model, None if is_nnx(model) else variables, ())[0]
  return moments_of_call(front_end, model, variables, graph, kept_weights(graph, masks), arrays)


def evaluate(model: Any, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
  """Runs a network on such variables: `model.apply` of linen, or a copy of a module of NNX in evaluation mode."""
  if not is_nnx(model):
    return model.apply(variables, *args, **kwargs)
  from sapr_jax.channels.nnx import evaluate as evaluate_module

  return evaluate_module(model, variables, *args, **kwargs)


def is_nnx(model: Any) -> bool:
  """Says whether an object is one of Flax NNX, which holds its variables: a module, or an optimizer."""
  library = sys.modules.get("flax.nnx")  # whoever has such an object has imported it
  return library is not None and isinstance(model, library.Pytree)


def network_of(model: Any, variables: Any, args: tuple[Any, ...]) -> tuple[FrontEnd, Any, tuple[Any, ...]]:
  """Returns the front end of a module, its variables and what follows these; those of NNX hold their variables."""
  if is_nnx(model):
    from sapr_jax.channels.nnx import NNX, check_is_module, variables_of

    check_is_module(model)
    return NNX, variables_of(model), args if variables is None else (variables, *args)
  check_module(model)
  return linen.LINEN, variables, args
