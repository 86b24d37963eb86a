"""Evaluates the program of a dense network on the arrays of a pruned one: the same equations, in other shapes.

That needs nothing of the model's code, which may compute a width (`reshape(x, (batch, length, heads, -1))`) or hold it
as a number. Each equation runs with the parameters it has in the dense program, but for those that say a shape. So the
result is what the masked network computes, by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from sapr_jax.channels.atoms import Axis, copied, find, sizes_after_cut
from sapr_jax.channels.contractions import scan_numbers
from sapr_jax.channels.program import ProgramError
from sapr_jax.channels.rules import AxisInterpreter, Place, Value, closed_jaxprs, dtype_of, shape_of
from sapr_jax.errors import InputError

Axes = Sequence[tuple[Axis, ...]]
Kept = Sequence[tuple[Axis, int]]
"""Atoms, and how many channels each of them keeps."""
Cut = tuple[str, int, int, tuple[tuple[int, int], ...]]
"""Path of a variable, axis, its size in the dense network, and (size, kept) of each atom that the axis is made of."""


class NarrowProgram:
  """Evaluates jaxprs with fewer channels.

  Attributes:
    interpreter: The interpreter that has run the program, and knows the axes of all results.
    kept: The atoms that are cut, and how many of their channels stay.
  """

  def __init__(self, interpreter: AxisInterpreter, kept: Kept):
    self.interpreter, self.kept = interpreter, [(find(atom), n) for atom, n in kept]
    for atom, _ in self.kept:
      if atom.kind is not None or atom.fixed:
        raise ProgramError(f"{atom.size} channels cannot be cut in this mode: {atom.fixed or 'they are taken apart'}")
    self.size = sizes_after_cut(self.kept)

  def run(self, closed: ClosedJaxpr, operands: Sequence[Any], axes: Axes, place: Place = ()) -> list[Any]:
    """Evaluates a jaxpr.

    Args:
      closed: The jaxpr, which the interpreter has run.
      operands: The narrow arrays.
      axes: Axes of the operands in the dense network.
      place: The place of the equation that holds the jaxpr.

    Raises:
      ProgramError: If an array has another shape than it must have.
    """
    jaxpr = closed.jaxpr
    values: dict[Var, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *operands), strict=True))
    known: dict[Var, tuple[Axis, ...]] = dict(zip(jaxpr.invars, axes, strict=True))

    def read(var: Var | Literal) -> Any:
      return var.val if isinstance(var, Literal) else values[var]

    def axes_of(var: Var | Literal) -> tuple[Axis, ...]:
      found = None if isinstance(var, Literal) else known.get(var)
      return tuple(map(Axis, shape_of(var))) if found is None else found

    for i, eqn in enumerate(jaxpr.eqns):
      here = (*place, i)
      results = self.evaluate(here, eqn, list(map(read, eqn.invars)), list(map(axes_of, eqn.invars)))
      values.update(zip(eqn.outvars, results, strict=True))
      known.update(zip(eqn.outvars, self.interpreter.results[here], strict=True))
    return list(map(read, jaxpr.outvars))

  def evaluate(self, place: Place, eqn: JaxprEqn, operands: Sequence[Any], axes: Axes) -> list[Any]:
    """Evaluates one equation of the program, on narrow arrays; arguments as in `run`."""
    found = self.interpreter.results.get(place, ())
    if list(map(len, found)) != [len(shape_of(var)) for var in eqn.outvars]:
      raise ProgramError("the model's code takes another way where the size of the batch is not known")
    shapes = [self.shape(a, shape_of(var)) for a, var in zip(found, eqn.outvars, strict=True)]
    results = self._evaluate(_Equation(eqn, place, operands, axes, shapes))
    for result, shape in zip(results, shapes, strict=True):
      if np.shape(result) != shape:
        raise ProgramError(f"`{eqn.primitive.name}` gives an array {list(np.shape(result))} instead of {list(shape)}")
    return results

  def shape(self, axes: Sequence[Axis], dense_shape: Sequence[int]) -> tuple[int, ...]:
    """Returns a narrow shape. A size may be a symbol in `dense_shape`, which the interpreter saw as a number."""
    sizes = zip(axes, map(self.size, axes), dense_shape, strict=True)
    return tuple(dense if n == axis.size else dense // axis.size * n for axis, n, dense in sizes)

  def _evaluate(self, equation: _Equation) -> list[Any]:
    name = equation.eqn.primitive.name
    if equation.is_whole:
      return equation.bind()
    if name in _HOLDS_JAXPR:
      return _HOLDS_JAXPR[name](self, equation)
    if name in _SHAPE_PARAMS:
      return equation.bind(**_SHAPE_PARAMS[name](self, equation))
    return equation.bind()

  def _inner(self, equation: _Equation) -> Callable[..., list[Any]]:
    """Returns the function that an equation holds as a jaxpr, on narrow arrays."""
    (closed,) = closed_jaxprs(equation.eqn)
    return lambda *operands: self.run(closed, operands, equation.axes, equation.place)

  def _derivative(
    self, dense: Callable[..., Any], like: Sequence[Any], axes: Axes, operands: Sequence[Any]
  ) -> list[Any]:
    """Evaluates a function that computes a derivative, and which takes the arrays `like` in the dense network."""
    try:
      closed = jax.make_jaxpr(dense)(*like)
    except jax.errors.UnexpectedTracerError as error:
      raise InputError(
        "A derivative of the model's own must not hold values that the model computes, as it is traced again; pass them"
        " to it as arguments, or leave this group out, by exclude= in trace_channels."
      ) from error
    copies: dict[int, Axis] = {}  # what is found out here must not change the axes of the network
    axes = [tuple(copied(axis, copies) for axis in found) for found in axes]
    interpreter = AxisInterpreter(training=self.interpreter.training)
    interpreter.run(closed.jaxpr, [Value(found, producers=frozenset({0})) for found in axes])
    kept = [(copies[id(atom)], n) for atom, n in self.kept if id(atom) in copies]
    return NarrowProgram(interpreter, kept).run(closed, operands, axes)


class _Equation:
  """One equation with its narrow operands, their axes, and the shapes that its results must have."""

  def __init__(
    self, eqn: JaxprEqn, place: Place, operands: Sequence[Any], axes: Axes, shapes: Sequence[tuple[int, ...]]
  ):
    self.eqn, self.place, self.operands, self.axes, self.shapes = eqn, place, operands, axes, shapes

  @property
  def is_whole(self) -> bool:
    """Whether nothing is cut from operands and results."""
    narrow = (*map(np.shape, self.operands), *self.shapes)
    return narrow == tuple(map(shape_of, (*self.eqn.invars, *self.eqn.outvars)))

  def bind(self, **changes: Any) -> list[Any]:
    """Evaluates it with some parameters changed."""
    return evaluate_alone(self.eqn.replace(params={**self.eqn.params, **changes}), *self.operands)


def evaluate_alone(eqn: JaxprEqn, *operands: Any) -> list[Any]:
  """Evaluates one equation, which may hold functions."""
  params = eqn.primitive.get_bind_params(eqn.params)
  functions, params = params if isinstance(params, tuple) else ((), params)  # as JAX before 0.8 returned them
  found = eqn.primitive.bind(*functions, *operands, **params)
  return list(found) if eqn.primitive.multiple_results else [found]


# ----------------------------------------------------------------------------------------------------------------------
# Parameters that say a shape
# ----------------------------------------------------------------------------------------------------------------------


def _conv(program: NarrowProgram, equation: _Equation) -> dict[str, Any]:
  numbers = equation.eqn.params["dimension_numbers"]
  feature, per_group = (np.shape(x)[spec[1]] for x, spec in zip(equation.operands, numbers[:2], strict=True))
  return {"feature_group_count": feature // per_group}


def _gather(program: NarrowProgram, equation: _Equation) -> dict[str, Any]:
  dense, narrow = shape_of(equation.eqn.invars[0]), np.shape(equation.operands[0])
  sizes = equation.eqn.params["slice_sizes"]
  return {"slice_sizes": tuple(n if size == d else size for size, d, n in zip(sizes, dense, narrow, strict=True))}


def _slice(program: NarrowProgram, equation: _Equation) -> dict[str, Any]:
  params, margins = equation.eqn.params, program.interpreter.margins[equation.place]
  starts = tuple(program.size(before) for before, _ in margins)
  ends = tuple(n - program.size(after) for n, (_, after) in zip(np.shape(equation.operands[0]), margins, strict=True))
  return {"start_indices": starts, "limit_indices": ends, "strides": params["strides"]}


def _tile(program: NarrowProgram, equation: _Equation) -> dict[str, Any]:
  return {"reps": tuple(n // size for n, size in zip(equation.shapes[0], np.shape(equation.operands[0]), strict=True))}


def _pad(program: NarrowProgram, equation: _Equation) -> dict[str, Any]:
  margins = program.interpreter.margins[equation.place]
  lost = [[axis.size - program.size(axis) for axis in pair] for pair in margins]
  config = zip(equation.eqn.params["padding_config"], lost, strict=True)
  return {"padding_config": tuple((low - a, high - b, inner) for (low, high, inner), (a, b) in config)}


_SHAPE_PARAMS: Mapping[str, Callable[[NarrowProgram, _Equation], dict[str, Any]]] = {
  "broadcast_in_dim": lambda program, equation: {"shape": equation.shapes[0]},
  "reshape": lambda program, equation: {"new_sizes": equation.shapes[0]},
  "iota": lambda program, equation: {"shape": equation.shapes[0]},
  "random_bits": lambda program, equation: {"shape": equation.shapes[0]},
  "tile": _tile,
  "dynamic_slice": lambda program, equation: {"slice_sizes": equation.shapes[0]},
  "split": lambda program, equation: {"sizes": tuple(s[equation.eqn.params["axis"]] for s in equation.shapes)},
  "conv_general_dilated": _conv,
  "gather": _gather,
  "slice": _slice,
  "pad": _pad,
}

# ----------------------------------------------------------------------------------------------------------------------
# Equations that hold a jaxpr
# ----------------------------------------------------------------------------------------------------------------------


def _call(program: NarrowProgram, equation: _Equation) -> list[Any]:
  return program._inner(equation)(*equation.operands)


def _checkpoint(program: NarrowProgram, equation: _Equation) -> list[Any]:
  options = {name: equation.eqn.params[name] for name in ("prevent_cse", "policy")}
  return jax.checkpoint(program._inner(equation), **options)(*equation.operands)


def _scan(program: NarrowProgram, equation: _Equation) -> list[Any]:
  (closed,) = closed_jaxprs(equation.eqn)
  num_consts, num_carry = scan_numbers(equation.eqn, closed.jaxpr)
  stacked = num_consts + num_carry
  axes = [*equation.axes[:stacked], *(a[1:] for a in equation.axes[stacked:])]
  shapes = [np.shape(x)[i >= stacked :] for i, x in enumerate(equation.operands)]
  like = [jax.ShapeDtypeStruct(s, dtype_of(var)) for s, var in zip(shapes, closed.jaxpr.invars, strict=True)]
  body = jax.make_jaxpr(lambda *operands: program.run(closed, operands, axes, equation.place))(*like)
  return equation.bind(jaxpr=body)


def _custom_derivative(program: NarrowProgram, equation: _Equation) -> list[Any]:
  """Keeps the user's rule: the program of the dense derivative is cut as any other."""
  eqn, axes, narrow = equation.eqn, equation.axes, program._inner(equation)
  is_real = [jnp.issubdtype(dtype_of(var), jnp.inexact) for var in eqn.invars]
  like: list[Any] = [jax.ShapeDtypeStruct(shape_of(var), dtype_of(var)) for var in eqn.invars]
  real_like, real_axes = ([x for x, real in zip(found, is_real, strict=True) if real] for found in (like, axes))
  real_out = [i for i, var in enumerate(eqn.outvars) if jnp.issubdtype(dtype_of(var), jnp.inexact)]

  def dense(operands: Sequence[Any]) -> tuple[Callable[..., list[Any]], list[Any]]:
    """Returns the function of the real operands, whose real results have derivatives, and these operands."""

    def function(*real: Any) -> list[Any]:
      values = iter(real)
      full = [next(values) if real else x for x, real in zip(operands, is_real, strict=True)]
      results = evaluate_alone(eqn, *full)
      return [results[i] for i in real_out]

    return function, [x for x, real in zip(operands, is_real, strict=True) if real]

  def zeros(shapes: Sequence[Any]) -> list[Any]:
    return [np.zeros(np.shape(shape), jax.dtypes.float0) for shape in shapes]

  if eqn.primitive.name.startswith("custom_jvp"):

    def derivative(*arrays: Any) -> list[Any]:
      function, real = dense(arrays[: len(like)])
      return jax.jvp(function, tuple(real), arrays[len(like) :])[1]

    run = jax.custom_jvp(lambda *xs: tuple(narrow(*xs)))

    @run.defjvp
    def jvp(primals: Any, tangents: Any) -> Any:
      given = [t for t, real in zip(tangents, is_real, strict=True) if real]
      found = program._derivative(derivative, (*like, *real_like), (*axes, *real_axes), (*primals, *given))
      results = run(*primals)
      out = zeros(results)
      for i, tangent in zip(real_out, found, strict=True):
        out[i] = tangent
      return results, tuple(out)

    return list(run(*equation.operands))

  out_like = [jax.ShapeDtypeStruct(shape_of(var), dtype_of(var)) for var in eqn.outvars]
  out_axes = program.interpreter.results[equation.place]

  def gradient(*arrays: Any) -> list[Any]:
    function, real = dense(arrays[: len(like)])
    return list(jax.vjp(function, *real)[1](list(arrays[len(like) :])))

  reverse: Any = jax.custom_vjp(lambda *xs: tuple(narrow(*xs)))

  def backward(operands: Any, cotangents: Any) -> Any:
    chosen: Any = [[found[i] for i in real_out] for found in (out_like, out_axes, cotangents)]
    found = iter(program._derivative(gradient, (*like, *chosen[0]), (*axes, *chosen[1]), (*operands, *chosen[2])))
    return tuple(next(found) if real else z for z, real in zip(zeros(operands), is_real, strict=True))

  reverse.defvjp(lambda *xs: (tuple(narrow(*xs)), xs), backward)
  return list(reverse(*equation.operands))


_HOLDS_JAXPR: Mapping[str, Callable[[NarrowProgram, _Equation], list[Any]]] = {
  **dict.fromkeys(("jit", "pjit", "closed_call", "core_call"), _call),
  **dict.fromkeys(("remat", "remat2", "checkpoint"), _checkpoint),
  **dict.fromkeys(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"), _custom_derivative),
  "scan": _scan,
}

INLINED = frozenset(name for name, evaluate in _HOLDS_JAXPR.items() if evaluate is not _scan)
"""Equations that compute what their jaxpr does, once."""
