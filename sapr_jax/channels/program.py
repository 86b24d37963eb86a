"""Traced programs, what a front end provides, and whether two programs are the same but for their shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from sapr_jax.channels.call import Call
from sapr_jax.channels.graph import ChannelGraph, Masks
from sapr_jax.channels.rules import Place, closed_jaxprs, shape_of


@dataclasses.dataclass(frozen=True)
class Program:
  """A traced network.

  Attributes:
    closed: Its closed jaxpr. The inputs are the leaves of the variables, then the arrays of the call.
    features: Module path -> number of output channels, for all modules that have it as a field.
  """

  closed: ClosedJaxpr
  features: Mapping[tuple[str, ...], int]


@dataclasses.dataclass(frozen=True)
class FrontEnd:
  """The functions that a module library provides; all else in `channels` is the same for each.

  Attributes:
    trace: (model, variables, call) -> its program. Variables may be `jax.ShapeDtypeStruct`s.
    narrow: (model, graph, masks) -> the model with the layers that `masks` leaves; None if that cannot be made.
    program: (model, cuts) -> the model that evaluates the dense program with fewer channels (`narrow_program.Cut`).
  """

  trace: Callable[[Any, Mapping[str, Any], Call], Program]
  narrow: Callable[[Any, ChannelGraph, Masks], Any]
  program: Callable[[Any, tuple[Any, ...]], Any]


class ProgramError(Exception):
  """The small model cannot be run, or its arrays have other shapes than the graph says."""


Shapes = Mapping[Place, Sequence[tuple[int, ...]]]


def difference(dense: ClosedJaxpr, small: ClosedJaxpr, shapes: Shapes) -> str | None:
  """Compares the program of a small model with the dense one's.

  Args:
    dense: Program of the dense model.
    small: Program of the small model.
    shapes: Place of an equation -> shapes of its results in the small model, where they differ from the dense ones.

  Returns:
    None if the programs are the same, which proves that the small model computes what the masked one does. Otherwise
    the first difference, in words; it may still be harmless. The shapes behind it were compared, unless the operations
    are others.

  Raises:
    ProgramError: If the small model is certainly wrong, with the reason.
  """
  return _compare(dense.jaxpr, small.jaxpr, shapes, ()) or _compare_consts(dense, small)


def _compare_consts(a: ClosedJaxpr, b: ClosedJaxpr) -> str | None:
  pairs = zip(a.consts, b.consts, strict=False)
  same = len(a.consts) == len(b.consts) and all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)
  return None if same else "a constant array differs"


def _compare(a: Jaxpr, b: Jaxpr, shapes: Shapes, outer: Place) -> str | None:
  if len(a.eqns) != len(b.eqns):
    return f"its program has {len(b.eqns)} operations instead of {len(a.eqns)}"
  if _arity(a) != _arity(b):
    return "its program takes or returns another number of arrays"
  first: str | None = None
  partner: dict[Var, Var] = dict(zip((*a.invars, *a.constvars), (*b.invars, *b.constvars), strict=False))
  for i, (x, y) in enumerate(zip(a.eqns, b.eqns, strict=True)):
    place = (*outer, i)
    name = x.primitive.name
    if x.primitive is not y.primitive or _arity(x) != _arity(y):
      return f"`{y.primitive.name}` stands in place of `{name}`"
    found = (_compare_operands(name, x.invars, y.invars, partner), _compare_params(x, y, shapes, place))
    first = first or found[0] or found[1]
    for shape, var in zip(shapes.get(place, list(map(shape_of, x.outvars))), y.outvars, strict=True):
      if shape != shape_of(var):
        raise ProgramError(f"`{name}` gives an array {list(shape_of(var))} instead of {list(shape)}")
    partner.update(zip(x.outvars, y.outvars, strict=True))
  return first or _compare_operands("return", a.outvars, b.outvars, partner)


def _arity(equation: JaxprEqn | Jaxpr) -> tuple[int, int]:
  return len(equation.invars), len(equation.outvars)


def _compare_operands(
  name: str, a: Sequence[Var | Literal], b: Sequence[Var | Literal], partner: Mapping[Var, Var]
) -> str | None:
  for u, v in zip(a, b, strict=True):
    if isinstance(u, Literal) and isinstance(v, Literal):
      if not np.array_equal(u.val, v.val, equal_nan=True):
        return f"`{name}` uses {v.val} where the dense model uses {u.val}"
    elif isinstance(u, Literal) or partner.get(u) is not v:
      return f"`{name}` has another operand"
  return None


# Parameters of primitives that follow from the shapes of operands and results.
_SHAPE_PARAMS = frozenset(
  {
    *("new_sizes", "shape", "feature_group_count", "sharding", "out_sharding", "slice_sizes", "sizes", "name"),
    *("start_indices", "limit_indices"),  # the start: as far as `_starts_follow` says
  }
)


def _compare_params(x: JaxprEqn, y: JaxprEqn, shapes: Shapes, place: Place) -> str | None:
  first: str | None = None
  if x.primitive.name == "slice" and not _starts_follow(x, y):
    first = f"`slice` has start_indices={y.params['start_indices']} instead of {x.params['start_indices']}"
  for name in sorted(x.params.keys() & y.params.keys() - _SHAPE_PARAMS):
    u, v = x.params[name], y.params[name]
    # Others are functions and objects that differ at each trace.
    if isinstance(u, bool | int | float | str | tuple) and not _holds_jaxpr(u) and not _equal(u, v):
      first = first or f"`{x.primitive.name}` has {name}={v} instead of {u}"
  inner = list(zip(closed_jaxprs(x), closed_jaxprs(y), strict=False))
  if len(closed_jaxprs(x)) != len(closed_jaxprs(y)):
    return f"`{x.primitive.name}` holds other programs"
  for inner_x, inner_y in inner:
    found = _compare(inner_x.jaxpr, inner_y.jaxpr, shapes, place)
    first = first or found or _compare_consts(inner_x, inner_y)
  return first


def _starts_follow(x: JaxprEqn, y: JaxprEqn) -> bool:
  """Returns whether a slice that gives the right number of entries certainly gives the right ones.

  That is not known of a slice in the middle of an axis that loses channels outside of it: they may be before or after.
  """
  ends = [(*shape_of(e.invars[0]), *shape_of(e.outvars[0])) for e in (x, y)]
  rank = len(x.params["start_indices"])
  strides = x.params["strides"] or (1,) * rank
  for dim, (start, limit, found) in enumerate(
    zip(x.params["start_indices"], x.params["limit_indices"], y.params["start_indices"], strict=True)
  ):
    outside, left = (shape[dim] - shape[rank + dim] for shape in ends)
    if strides[dim] != 1:
      if ends[0][dim] != ends[1][dim]:
        return False
      right = start
    elif start == 0 or outside == left:
      right = start
    elif limit == ends[0][dim]:
      right = left
    else:
      return False
    if found != right:
      return False
  return True


def _holds_jaxpr(param: Any) -> bool:
  return isinstance(param, tuple) and any(isinstance(entry, ClosedJaxpr | Jaxpr) for entry in param)


def _equal(u: Any, v: Any) -> bool:
  return u == v or (u != u and v != v)  # NaN is equal to NaN
