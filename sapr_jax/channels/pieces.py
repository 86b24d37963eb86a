"""The program of a network in pieces: each layer with what is computed from its result, runnable in any width.

A piece begins with a convolution or matrix product that depends on the network's inputs. The other equations (biases,
normalization, activation, additions, pooling) are in the piece of the last layer that they depend on, or of the later
one where alone their results are used, as compilers fuse them. So the pieces together are the network.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from sapr_jax.channels.analysis import Axes, interpret
from sapr_jax.channels.atoms import Axis, atoms, channel_index, find
from sapr_jax.channels.call import Call
from sapr_jax.channels.graph import ChannelGraph
from sapr_jax.channels.narrow_program import INLINED, NarrowProgram
from sapr_jax.channels.program import Program
from sapr_jax.channels.rules import AxisInterpreter, Place, closed_jaxprs, dtype_of, shape_of
from sapr_jax.errors import InputError

Name = tuple[Place, int]
"""A value: the place of its equation, and which of its results. `_INPUT` and `_CONSTANT` stand in for a place."""
_INPUT, _CONSTANT = (-1,), (-2,)
_CONTRACTIONS = ("conv_general_dilated", "dot_general")


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
  """Some equations of a network's program, as a function of arrays whose shapes follow from the widths of groups.

  Attributes:
    layer: Its convolution or matrix product, with shapes, in words.
    dtype: The dtype of what that gives.
    groups: Names of the channel groups that its arrays have as axes, in the order of first use.
    sizes: Their widths in the dense network.
    key: Equal for two pieces that do the same: the same equations, shapes, and axes that change with the groups.
    function: Evaluates it: a list of narrow arrays -> a list of narrow results.
    shapes: Widths of its groups -> shapes and dtypes of the arrays that it takes.
    takes: Names of these arrays. The k-th input of the program, a leaf of the variables or of the call, is ((-1,), k).
    gives: Names of its results.
    feeds_layer: Whether the layer depends on each of them.
  """

  layer: str
  dtype: str
  groups: tuple[str, ...]
  sizes: tuple[int, ...]
  key: str
  function: Callable[[Sequence[int], Sequence[Any]], list[Any]]
  shapes: Callable[[Sequence[int]], list[jax.ShapeDtypeStruct]]
  takes: tuple[Name, ...]
  gives: tuple[Name, ...]
  feeds_layer: tuple[bool, ...]


def pieces_of(
  program: Program, variables: Mapping[str, Any], call: Call, graph: ChannelGraph
) -> tuple[list[Piece], Piece]:
  """Divides a program, of the network of `graph` for any call.

  Returns:
    Its pieces, in forward order, and all of it as one.

  Raises:
    InputError: If it has no layer, or not those groups.
  """
  axes, interpreter = interpret(program, variables, call)
  network = _Network(program.closed, axes, interpreter, _atoms_of_groups(axes, graph))
  divided = network.divide()
  if not divided:
    raise InputError(
      "graph must be of this model, which has no convolution or matrix product; call trace_channels again."
    )
  return [network.piece(equations) for equations in divided], network.piece(network.equations)


def _atoms_of_groups(axes: Axes, graph: ChannelGraph) -> dict[str, Axis]:
  """Returns the atom of each group, by what the graph says of one of its members."""
  found = {}
  for group in graph.groups:
    member = group.members[0]
    axis = axes[member.collection, *member.path][member.axis]
    same = [a for a in atoms(axis) if np.array_equal(channel_index(axis, a), member.channels)]
    if not same:
      raise InputError(
        f"graph must be of this model, which has no such group {group.name!r}; call trace_channels again."
      )
    found[group.name] = same[0]
  return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Equation:
  """An equation of the program after calls were replaced by what they call."""

  place: Place
  eqn: JaxprEqn
  operands: tuple[Name | Literal, ...]

  @property
  def names(self) -> list[Name]:
    """The values that it reads."""
    return [operand for operand in self.operands if not isinstance(operand, Literal)]

  @property
  def results(self) -> list[Name]:
    return [(self.place, i) for i in range(len(self.eqn.outvars))]

  @property
  def is_layer(self) -> bool:
    return _holds_layer(self.eqn)


def _holds_layer(eqn: JaxprEqn) -> bool:
  inner = (e for closed in closed_jaxprs(eqn) for e in closed.jaxpr.eqns)
  return eqn.primitive.name in _CONTRACTIONS or any(map(_holds_layer, inner))


class _Network:
  """A program without calls, whose values have axes."""

  def __init__(
    self, closed: ClosedJaxpr, axes: Axes, interpreter: AxisInterpreter, group_atoms: Mapping[str, Axis]
  ) -> None:
    self.interpreter, self.group_atoms = interpreter, group_atoms
    self.equations: list[_Equation] = []
    self.constants: dict[Name, Any] = {}
    self.axes: dict[Name, tuple[Axis, ...]] = {}
    self.avals: dict[Name, jax.ShapeDtypeStruct] = {}
    inputs: list[Name] = [(_INPUT, i) for i in range(len(closed.jaxpr.invars))]
    known = list(axes.values())
    for i, (name, var) in enumerate(zip(inputs, closed.jaxpr.invars, strict=True)):
      self._note(name, known[i] if i < len(known) else tuple(map(Axis, shape_of(var))), var)
    self.depends = set(inputs[len(known) :])
    self.outputs = set(self._inline(closed, inputs, ()))

  def _note(self, name: Name, axes: tuple[Axis, ...], var: Any) -> None:
    self.axes[name], self.avals[name] = axes, jax.ShapeDtypeStruct(shape_of(var), dtype_of(var))

  def _inline(self, closed: ClosedJaxpr, operands: Sequence[Name | Literal], place: Place) -> list[Any]:
    """Appends the equations of a jaxpr; returns the names of its results."""
    names: dict[Any, Name | Literal] = dict(zip(closed.jaxpr.invars, operands, strict=True))
    for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
      name: Name = (_CONSTANT, len(self.constants))
      names[var] = name
      self.constants[name] = value
      self._note(name, tuple(map(Axis, np.shape(value))), var)

    def read(var: Any) -> Name | Literal:
      return var if isinstance(var, Literal) else names[var]

    for i, eqn in enumerate(closed.jaxpr.eqns):
      here, read_here = (*place, i), tuple(map(read, eqn.invars))
      inner = closed_jaxprs(eqn)
      if eqn.primitive.name in INLINED and len(inner) == 1 and len(inner[0].jaxpr.invars) == len(read_here):
        names.update(zip(eqn.outvars, self._inline(inner[0], read_here, here), strict=True))
        continue
      equation = _Equation(here, eqn, read_here)
      self.equations.append(equation)
      for name, var, axes in zip(equation.results, eqn.outvars, self.interpreter.results[here], strict=True):
        names[var] = name
        self._note(name, axes, var)
        if self.depends.intersection(equation.names):
          self.depends.add(name)
    return list(map(read, closed.jaxpr.outvars))

  def divide(self) -> list[list[_Equation]]:
    """Returns the equations of each piece."""
    number: dict[Place, int] = {}
    layers = 0
    users: dict[Place, list[_Equation]] = {}
    for equation in self.equations:
      for name in equation.names:
        users.setdefault(name[0], []).append(equation)
      if not self.depends.intersection(equation.results):
        continue
      if equation.is_layer:
        layers += 1
        number[equation.place] = layers
      else:
        number[equation.place] = max([1, *(number.get(place, 1) for place, _ in equation.names)])
    for equation in reversed(self.equations):
      place, using = equation.place, users.get(equation.place, [])
      later = {number[user.place] for user in using if user.place in number}
      if place not in number:  # of variables alone
        if later:
          number[place] = min(later)
      elif self._moves(equation, using) and len(later) == 1:
        number[place] = max(later)
    divided: list[list[_Equation]] = [[] for _ in range(layers)]
    for equation in self.equations:
      if layers and equation.place in number:
        divided[number[equation.place] - 1].append(equation)
    return divided

  def _moves(self, equation: _Equation, using: Sequence[_Equation]) -> bool:
    """Returns whether a compiler would compute an equation where it is used."""
    return not any(e.is_layer for e in (equation, *using)) and not self.outputs.intersection(equation.results)

  def piece(self, equations: Sequence[_Equation]) -> Piece:
    own = {name for equation in equations for name in equation.results}
    read = [name for equation in equations for name in equation.names if name not in own]
    inputs = [name for name in dict.fromkeys(read) if name[0] != _CONSTANT]
    places = {equation.place for equation in equations}
    elsewhere = {n for other in self.equations if other.place not in places for n in other.names} | self.outputs
    outputs = [name for equation in equations for name in equation.results if name in elsewhere]
    layer = next(equation for equation in equations if equation.is_layer)
    groups = self._groups([*inputs, *(name for equation in equations for name in equation.results)])

    def narrow(widths: Sequence[int]) -> NarrowProgram:
      cut = zip(groups, widths, strict=True)
      kept = [(self.group_atoms[group], n) for group, n in cut if n < find(self.group_atoms[group]).size]
      return NarrowProgram(self.interpreter, kept)

    def function(widths: Sequence[int], arrays: Sequence[Any]) -> list[Any]:
      program = narrow(widths)
      values: dict[Name, Any] = {**self.constants, **dict(zip(inputs, arrays, strict=True))}
      for equation in equations:
        read = [o.val if isinstance(o, Literal) else values[o] for o in equation.operands]
        axes = [
          tuple(map(Axis, np.shape(o.val))) if isinstance(o, Literal) else self.axes[o] for o in equation.operands
        ]
        values.update(zip(equation.results, program.evaluate(equation.place, equation.eqn, read, axes), strict=True))
      return [values[name] for name in outputs]

    def shapes(widths: Sequence[int]) -> list[jax.ShapeDtypeStruct]:
      shape = narrow(widths).shape
      return [jax.ShapeDtypeStruct(shape(self.axes[n], self.avals[n].shape), self.avals[n].dtype) for n in inputs]

    feeds = self._needed(equations, layer)
    return Piece(
      self._in_words(layer),
      str(dtype_of(layer.eqn.outvars[0])),
      tuple(groups),
      tuple(find(self.group_atoms[group]).size for group in groups),
      self._key(equations, inputs, outputs, groups),
      function,
      shapes,
      tuple(inputs),
      tuple(outputs),
      tuple(name in feeds for name in inputs),
    )

  def _groups(self, names: Sequence[Name]) -> list[str]:
    group_of = {id(find(atom)): group for group, atom in self.group_atoms.items()}
    found = [group_of.get(id(atom)) for name in names for axis in self.axes[name] for atom in atoms(axis)]
    return [group for group in dict.fromkeys(found) if group is not None]

  def _needed(self, equations: Sequence[_Equation], layer: _Equation) -> set[Name]:
    """Returns what the layer depends on."""
    needed = set(layer.names)
    for equation in reversed(equations):
      if needed.intersection(equation.results):
        needed.update(equation.names)
    return needed

  def _in_words(self, layer: _Equation) -> str:
    """Describes a layer: `conv_general_dilated float32[8,32,32,16] float32[3,3,16,16]`."""
    arrays = [self.avals[name] for name in layer.names]
    shapes = [f"{a.dtype.name}[{','.join(map(str, a.shape))}]" for a in arrays]
    return " ".join([layer.eqn.primitive.name, *shapes[:3]])

  def _key(self, equations: Sequence[_Equation], inputs: Any, outputs: Any, groups: Sequence[str]) -> str:
    local = {id(find(self.group_atoms[group])): f"g{i}" for i, group in enumerate(groups)}
    numbers: dict[Name, int] = {}

    def size(axis: Axis) -> str:
      axis = find(axis)
      if axis.kind is None:
        return local.get(id(axis), "") + str(axis.size)
      return f"{axis.kind}({' '.join(map(size, axis.parts))})"

    def text(operand: Name | Literal) -> str:
      if isinstance(operand, Literal):
        return f"{operand.val}:{dtype_of(operand)}"
      if operand not in numbers:
        numbers[operand] = len(numbers)
        constant = self.constants.get(operand)
        values = "" if constant is None else np.asarray(constant).tobytes().hex()
        return f"{numbers[operand]}={self.avals[operand].dtype}[{','.join(map(size, self.axes[operand]))}]{values}"
      return str(numbers[operand])

    lines = []
    for equation in equations:
      params = re.sub(r" at 0x[0-9a-f]+|name=\w+", "", str(sorted(equation.eqn.params.items())))
      values = " ".join(map(text, (*equation.operands, *equation.results)))
      lines.append(f"{equation.eqn.primitive.name} {params} {values}")
    return "\n".join([*lines, *map(text, outputs)])
