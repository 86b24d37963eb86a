"""What each JAX primitive says about channels: one small rule per primitive, in `primitives` and `layers`.

A rule gets the `Walk`, an equation of the jaxpr and the `Value`s of its operands, and returns the `Value`s of its
results, having called `unify` and `fix` on the way. A primitive without a rule fixes every axis it touches: never
wrong, at worst less prunable. `register_rule` adds one for a primitive that this package does not know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from sapr_jax.channels.atoms import Axis, fix

ParamKey = tuple[str, ...]
"""Where a variable lies: its collection, then the names of modules, then its own: ("params", "conv1", "kernel")."""

Place = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Value:
  """What is known of one traced array.

  Attributes:
    axes: One `Axis` per dimension.
    zeroed_by: Variables whose zeros it inherits: where one of them is zero at channel c, so is this value. A kernel
      that is only cast or transposed has itself here; what comes out of a layer has nothing.
    producers: Ids of the layers (convolutions, matrix products, the input is one too) it was computed from without
      another layer in between. Empty if it does not depend on the input.
  """

  axes: tuple[Axis, ...]
  zeroed_by: frozenset[ParamKey] = frozenset()
  producers: frozenset[int] = frozenset()


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


@dataclasses.dataclass
class Walk:
  """What the walk over the jaxpr collects; rules add to it.

  Attributes:
    contractions: In forward order.
    results: Place of an equation -> the axes of its results. A place is the index of the equation in its jaxpr, after
      those of the equations that hold the jaxpr.
    repetitions: How often the code now walked runs for one image (the length of enclosing scans).
    next_producer: Id of the next layer; the network's input has id 0.
    place: Place of the equation now walked.
  """

  contractions: list[Contraction] = dataclasses.field(default_factory=list)
  results: dict[Place, list[tuple[Axis, ...]]] = dataclasses.field(default_factory=dict)
  repetitions: int = 1
  next_producer: int = 1
  place: Place = ()

  def walk_jaxpr(self, jaxpr: Any, operands: Sequence[Value]) -> list[Value]:
    """Applies the rules to all equations of `jaxpr`, whose inputs are `operands`; returns the values of its outputs."""
    values: dict[Any, Value] = dict(zip(jaxpr.invars, operands, strict=True))
    outer = self.place

    def read(atom: Any) -> Value:
      if hasattr(atom, "val") or atom not in values:
        # An array in the model's code keeps its shape, whatever is cut around it.
        return Value(fixed_axes(atom.aval.shape, "it meets a constant array of the model's code"))
      return values[atom]

    for i, eqn in enumerate(jaxpr.eqns):
      self.place = (*outer, i)
      results = RULES.get(eqn.primitive.name, unknown)(self, eqn, [read(atom) for atom in eqn.invars])
      self.results[(*outer, i)] = [value.axes for value in results]
      values.update(zip(eqn.outvars, results, strict=True))
    self.place = outer
    return [read(atom) for atom in jaxpr.outvars]

  def new_producer(self) -> frozenset[int]:
    self.next_producer += 1
    return frozenset({self.next_producer - 1})


Rule = Callable[[Walk, Any, Sequence[Value]], list[Value]]
RULES: dict[str, Rule] = {}


def register_rule(*primitives: str) -> Callable[[Rule], Rule]:
  """Registers the decorated function as the rule of the named primitives, in place of an earlier one.

  Example:
    >>> @register_rule("my_activation")
    ... def my_activation(walk, eqn, operands):
    ...   return [dataclasses.replace(operands[0], zeroed_by=frozenset())]
  """

  def register(rule: Rule) -> Rule:
    for primitive in primitives:
      RULES[primitive] = rule
    return rule

  return register


def fixed_axes(shape: Sequence[int], reason: str) -> tuple[Axis, ...]:
  """Returns new axes that must keep their size."""
  return tuple(Axis(size, fixed=reason) for size in shape)


def union(sets: Sequence[frozenset]) -> frozenset:
  return frozenset().union(*sets)


def unknown(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  """Fixes all axes of the operands; the results' axes are new and fixed."""
  reason = f"it goes through `{eqn.primitive.name}`, for which there is no rule"
  for operand in operands:
    for axis in operand.axes:
      fix(axis, reason)
  producers = union([operand.producers for operand in operands])
  return [Value(fixed_axes(var.aval.shape, reason), producers=producers) for var in eqn.outvars]


def inner_jaxprs(eqn: Any) -> list[Any]:
  """Returns the jaxprs among the parameters of `eqn`."""
  found = []
  for param in eqn.params.values():
    for candidate in param if isinstance(param, list | tuple) else (param,):
      jaxpr = getattr(candidate, "jaxpr", candidate)
      if hasattr(jaxpr, "eqns") and hasattr(jaxpr, "invars"):
        found.append(jaxpr)
  return found
