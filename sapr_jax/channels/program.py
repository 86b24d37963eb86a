"""The program of a network, and whether the pruned network is the same program but for its shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax.channels.graph import ChannelGraph, Masks
from sapr_jax.channels.rules import Place, inner_jaxprs


def trace_program(
  model: nn.Module, variables: Mapping[str, Any], inputs: jax.ShapeDtypeStruct, apply_kwargs: Mapping[str, Any]
) -> tuple[Any, dict[tuple[str, ...], int]]:
  """Traces `model.apply`.

  Returns:
    The closed jaxpr, whose inputs are the leaves of `variables` and then the image; and the field `features` of the
    modules that have it as an integer, by their paths.
  """
  features: dict[tuple[str, ...], int] = {}

  def note_features(next_fun, args, kwargs, context):
    value = getattr(context.module, "features", None)
    if isinstance(value, int):
      features[context.module.path] = value
    return next_fun(*args, **kwargs)

  def apply(variables, x):
    with nn.intercept_methods(note_features):
      return model.apply(variables, x, **apply_kwargs)

  return jax.make_jaxpr(apply)(abstract(variables), inputs), features


def abstract(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the shapes and dtypes of variables, as `jax.ShapeDtypeStruct`s."""
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), dict(variables))


class ProgramError(Exception):
  """The small model cannot be run, or its arrays have other shapes than the graph says."""


def compare_programs(small: nn.Module, variables: Mapping[str, Any], graph: ChannelGraph, masks: Masks) -> str | None:
  """Compares the program of the small model with the dense one's.

  Args:
    small: The small model.
    variables: Its variables, or their shapes.
    graph: The graph of the dense network.
    masks: Which of its channels the small model has.

  Returns:
    None if they are the same, which proves that the small model computes what the masked one does; else where they
    differ, in words. A difference may still be harmless.

  Raises:
    ProgramError: If the small model is certainly wrong, with the reason.
  """
  try:
    program, _ = trace_program(small, variables, graph.inputs, graph.apply_kwargs)
  except Exception as error:  # the model's own code may fail in any way
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ProgramError(f"the small model does not run: {reason}") from error
  for x, y in zip(graph.jaxpr.consts, program.consts, strict=False):
    if jnp.shape(x) != jnp.shape(y) or not np.array_equal(x, y):
      return "a constant array differs"
  kept = graph.kept(masks)
  shapes = {
    place: [tuple(size if isinstance(size, int) else size(kept) for size in result) for result in results]
    for place, results in graph.results.items()
  }
  return _compare(graph.jaxpr.jaxpr, program.jaxpr, shapes, ())


Shapes = Mapping[Place, Sequence[tuple[int, ...]]]


def _compare(a: Any, b: Any, shapes: Shapes, outer: Place) -> str | None:
  if len(a.eqns) != len(b.eqns):
    return f"its program has {len(b.eqns)} operations instead of {len(a.eqns)}"
  partner = dict(zip((*a.invars, *a.constvars), (*b.invars, *b.constvars), strict=False))
  for i, (x, y) in enumerate(zip(a.eqns, b.eqns, strict=True)):
    if x.primitive is not y.primitive or len(x.invars) != len(y.invars):
      return f"`{y.primitive.name}` stands in place of `{x.primitive.name}`"
    difference = _compare_operands(x.primitive.name, x.invars, y.invars, partner) or _compare_params(
      x, y, shapes, (*outer, i)
    )
    if difference:
      return difference
    expected = shapes.get((*outer, i), [var.aval.shape for var in x.outvars])
    for shape, var in zip(expected, y.outvars, strict=True):
      if shape != var.aval.shape:
        raise ProgramError(f"`{x.primitive.name}` gives an array {list(var.aval.shape)} instead of {list(shape)}")
    partner.update(zip(x.outvars, y.outvars, strict=True))
  return _compare_operands("return", a.outvars, b.outvars, partner)


def _compare_operands(name: str, a: Sequence[Any], b: Sequence[Any], partner: Mapping[Any, Any]) -> str | None:
  for u, v in zip(a, b, strict=True):
    if hasattr(u, "val") != hasattr(v, "val"):
      return f"`{name}` has another operand"
    if hasattr(u, "val"):
      if not np.array_equal(u.val, v.val):
        return f"`{name}` uses {v.val} where the dense model uses {u.val}"
    elif partner.get(u) is not v:
      return f"`{name}` has another operand"
  return None


# Parameters of primitives that follow from the shapes of operands and results.
_SHAPE_PARAMS = frozenset(
  {"new_sizes", "shape", "feature_group_count", "sharding", "out_sharding", "slice_sizes", "limit_indices", "name"}
)


def _compare_params(x: Any, y: Any, shapes: Shapes, place: Place) -> str | None:
  for name in x.params.keys() & y.params.keys() - _SHAPE_PARAMS:
    u, v = x.params[name], y.params[name]
    # Others are functions and objects that JAX makes anew at each trace.
    if isinstance(u, bool | int | float | str | tuple) and not _holds_jaxpr(u) and u != v:
      return f"`{x.primitive.name}` has {name}={v} instead of {u}"
  for inner_x, inner_y in zip(inner_jaxprs(x), inner_jaxprs(y), strict=True):
    if difference := _compare(inner_x, inner_y, shapes, place):
      return difference
  return None


def _holds_jaxpr(param: Any) -> bool:
  return isinstance(param, tuple) and any(hasattr(entry, "eqns") or hasattr(entry, "jaxpr") for entry in param)
