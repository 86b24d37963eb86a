"""The interpreter that assigns an `Axis` to each dimension of each traced array, by one rule for each JAX primitive.

A rule takes the `AxisInterpreter`, an equation of the jaxpr and the `Value`s of its operands. It calls `unify` and
`fix`, and returns the `Value`s of the results. The rules are in `primitives` and `contractions`; `register_rule` adds
others. A primitive without a rule fixes every axis it touches: never wrong, at worst less prunable.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from sapr_jax.channels.atoms import Axis, fix
from sapr_jax.checks import check_function, shown
from sapr_jax.errors import InputError

ParamKey = tuple[str, ...]
"""Path of a variable: its collection, the names of its modules, its own name: ("params", "conv1", "kernel")."""

Place = tuple[int, ...]
"""Place of an equation: its index in its jaxpr, after the indices of the equations that hold that jaxpr."""


@dataclasses.dataclass(frozen=True)
class Value:
  """Axes and origin of one traced array.

  Attributes:
    axes: One `Axis` per dimension.
    zeroed_by: Variables whose zeros it inherits: where one of them is zero at channel c, so is this value. For a kernel
      that is only cast or transposed, the kernel itself; empty for the output of a layer.
    producers: Ids of the nearest layers before it (convolutions and matrix products; the input counts as one). Empty if
      it does not depend on the input.
    is_zero: Whether it is known to be zero everywhere, as a literal 0 is.
  """

  axes: tuple[Axis, ...]
  zeroed_by: frozenset[ParamKey] = frozenset()
  producers: frozenset[int] = frozenset()
  is_zero: bool = False


@dataclasses.dataclass(frozen=True)
class Contraction:
  """A convolution or matrix product found in the trace.

  Attributes:
    kernel: Variables that zero its kernel operand (see `Value.zeroed_by`).
    reduced: Pairs of axes summed over: of the other operand, and of the kernel.
    free: The kernel's axes that become output channels.
    factors: Its MACs for one image are the product of the sizes of these axes times `constant`.
    constant: Repetitions and window positions that no mask changes.
    multiplier: Output channels per input channel if it is depthwise, else None.
  """

  kernel: frozenset[ParamKey]
  reduced: tuple[tuple[Axis, Axis], ...]
  free: tuple[Axis, ...]
  factors: tuple[Axis, ...]
  constant: int
  multiplier: int | None = None

  @property
  def macs(self) -> int:
    return self.constant * math.prod(axis.size for axis in self.factors)


@dataclasses.dataclass
class AxisInterpreter:
  """Evaluates a jaxpr on `Value`s in place of arrays.

  Attributes:
    contractions: All contractions found, in forward order.
    results: Place of an equation -> the axes of each of its results.
    margins: Place of a `slice` or `pad` -> for each dimension of its operand, the axes of the entries (before, after)
      that it takes away or adds; of size 0 where there are none. In a narrower network a slice starts at the size of
      the first, and ends before the second; an amount of padding shrinks by the channels that its margin loses.
    pieces: Result of a `concatenate` -> its dimension, and what was concatenated if all of that are kernels, else ().
    training: Whether a network in training is traced: random numbers are then drawn for the channels that are left, as
      masks of dropout are. Otherwise they are constants, whose shape is fixed.
    repetitions: How often the current equation runs for one image (the length of enclosing scans).
    next_producer: Id of the next layer; the network's input has id 0.
    place: Place of the current equation.
  """

  contractions: list[Contraction] = dataclasses.field(default_factory=list)
  results: dict[Place, list[tuple[Axis, ...]]] = dataclasses.field(default_factory=dict)
  margins: dict[Place, tuple[tuple[Axis, Axis], ...]] = dataclasses.field(default_factory=dict)
  pieces: dict[Var, tuple[int, Sequence[Value]]] = dataclasses.field(default_factory=dict)
  training: bool = False
  repetitions: int = 1
  next_producer: int = 1
  place: Place = ()

  def run(self, jaxpr: Jaxpr, operands: Sequence[Value]) -> list[Value]:
    """Applies the rules to all equations of `jaxpr`, whose inputs are `operands`; returns the values of its outputs."""
    values: dict[Var, Value] = dict(zip(jaxpr.invars, operands, strict=True))
    outer = self.place

    def read(var: Var | Literal) -> Value:
      if isinstance(var, Literal) or var not in values:
        # An array in the model's code keeps its shape, whatever is cut around it.
        axes = fixed_axes(shape_of(var), "it meets a constant array of the model's code")
        is_zero = isinstance(var, Literal) and not axes and np.issubdtype(dtype_of(var), np.number) and var.val == 0
        return Value(axes, is_zero=bool(is_zero))
      return values[var]

    for i, eqn in enumerate(jaxpr.eqns):
      self.place = (*outer, i)
      results = RULES.get(eqn.primitive.name, unknown)(self, eqn, [read(var) for var in eqn.invars])
      self.results[self.place] = [value.axes for value in results]
      values.update(zip(eqn.outvars, results, strict=True))
    self.place = outer
    return [read(var) for var in jaxpr.outvars]

  def new_producer(self) -> frozenset[int]:
    self.next_producer += 1
    return frozenset({self.next_producer - 1})


Rule = Callable[[AxisInterpreter, JaxprEqn, Sequence[Value]], list[Value]]
RULES: dict[str, Rule] = {}


def register_rule(*primitives: str) -> Callable[[Rule], Rule]:
  """Registers the decorated function as the rule of the named primitives, in place of an earlier one.

  Example:
    >>> import dataclasses
    >>> from sapr_jax import register_rule
    >>> @register_rule("my_activation")
    ... def my_activation(interpreter, eqn, operands):
    ...   (x,) = operands
    ...   return [dataclasses.replace(x, zeroed_by=frozenset())]  # the same axes, but f(0) need not be 0
  """

  if not primitives or not all(isinstance(name, str) for name in primitives):
    raise InputError(
      f"register_rule must be given names of primitives, got {shown(primitives)}; @register_rule('sort')."
    )

  def register(rule: Rule) -> Rule:
    check_function("a rule", rule, "its arguments are interpreter, eqn and operands")
    for primitive in primitives:
      RULES[primitive] = rule
    return rule

  return register


def fixed_axes(shape: Sequence[int], reason: str) -> tuple[Axis, ...]:
  """Returns new axes that must keep their size."""
  return tuple(Axis(size, fixed=reason) for size in shape)


def union(sets: Sequence[frozenset]) -> frozenset:
  return frozenset().union(*sets)


def unknown(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  """Fixes all axes of the operands; the results' axes are new and fixed."""
  reason = f"it goes through `{eqn.primitive.name}`, for which there is no rule"
  for operand in operands:
    for axis in operand.axes:
      fix(axis, reason)
  producers = union([operand.producers for operand in operands])
  return [Value(fixed_axes(shape_of(var), reason), producers=producers) for var in eqn.outvars]


def shape_of(var: Var | Literal) -> tuple[int, ...]:
  return getattr(var.aval, "shape", ())  # a token has no shape


def dtype_of(var: Var | Literal) -> Any:
  return getattr(var.aval, "dtype", None)


def closed_jaxprs(eqn: JaxprEqn) -> list[ClosedJaxpr]:
  """Returns the jaxprs among the parameters of `eqn`, with their constants."""
  found = []
  for param in eqn.params.values():
    for entry in param if isinstance(param, list | tuple) else (param,):
      if isinstance(entry, ClosedJaxpr | Jaxpr):
        found.append(entry if isinstance(entry, ClosedJaxpr) else ClosedJaxpr(entry, ()))
  return found


def inner_jaxprs(eqn: JaxprEqn) -> list[Jaxpr]:
  """Returns the jaxprs among the parameters of `eqn`."""
  return [closed.jaxpr for closed in closed_jaxprs(eqn)]
