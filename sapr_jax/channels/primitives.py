"""Rules for primitives that compute entry by entry, move entries around, or act along some axes only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jax.extend.core import JaxprEqn, Var

from sapr_jax.channels.atoms import Axis, atoms, concatenation, fix, mark_joined, product, unify
from sapr_jax.channels.rules import (
  AxisInterpreter,
  ParamKey,
  Value,
  dtype_of,
  fixed_axes,
  register_rule,
  shape_of,
  union,
  unknown,
)

# ----------------------------------------------------------------------------------------------------------------------
# Elementwise
# ----------------------------------------------------------------------------------------------------------------------

# f(0) = 0, so a masked kernel stays masked through them.
_ZERO_PRESERVING = frozenset(
  {
    *("neg", "abs", "sign", "sqrt", "cbrt", "square", "tanh", "sin", "tan", "sinh", "asin", "atan", "asinh", "atanh"),
    *("expm1", "log1p", "erf", "floor", "ceil", "round", "convert_element_type", "reduce_precision", "real"),
  }
)
_OTHER_ELEMENTWISE = (
  *("exp", "exp2", "log", "cos", "cosh", "acos", "acosh", "rsqrt", "logistic", "erfc", "erf_inv", "lgamma", "digamma"),
  *("igamma", "igammac", "bessel_i0e", "bessel_i1e", "imag", "conj", "complex", "is_finite", "clz", "population_count"),
  *("add", "add_any", "sub", "max", "min", "mul", "div", "rem", "pow", "integer_pow", "atan2", "nextafter", "clamp"),
  *("select_n", "not", "and", "or", "xor", "eq", "ne", "lt", "le", "gt", "ge", "eq_to", "lt_to", "le_to"),
  *("shift_left", "shift_right_logical", "shift_right_arithmetic"),
)
# Scaling one activation by another (a gate, squeeze-and-excitation) does not join them as a residual stream does.
_NOT_JOINING = frozenset({"mul", "div"})


@register_rule(*_ZERO_PRESERVING, *_OTHER_ELEMENTWISE)
def elementwise(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  """Unifies the axes of the operands, except those that are broadcast (scalars, size 1)."""
  shape = shape_of(eqn.outvars[0])
  full = [operand for operand in operands if len(operand.axes) == len(shape)]
  axes = []
  for dim, size in enumerate(shape):
    same = [operand.axes[dim] for operand in full if operand.axes[dim].size == size]
    for other in same[1:]:
      unify(same[0], other)
    axes.append(same[0])
  # What is the same along another axis only shifts the channels, as a bias does: an embedding of the time, added at all
  # places of an image, or an attention mask, added for all heads. What is true or false only selects.
  pairs = zip(operands, eqn.invars, strict=True)
  whole = [operand for operand, var in pairs if shape_of(var) == shape and dtype_of(var) != np.bool_]
  if eqn.primitive.name not in _NOT_JOINING and len({o.producers for o in whole if o.producers}) > 1:
    for axis in axes:
      mark_joined(axis)
  producers = union([operand.producers for operand in operands])
  is_zero = eqn.primitive.name in _ZERO_PRESERVING and operands[0].is_zero
  return [Value(tuple(axes), _zeroed_by(eqn, operands), producers, is_zero) for _ in eqn.outvars]


@register_rule("copy", "copy_p", "name", "optimization_barrier", "sharding_constraint", "stop_gradient")
def identity(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  return list(operands)


@register_rule("psum", "psum2", "psum_invariant", "pmax", "pmin", "pvary")
def across_devices(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  """Combines the entries of several devices, each with those of the same place: as batch statistics are."""
  if not all(isinstance(axis, str) for axis in eqn.params["axes"]):  # a number is a dimension of the array
    return unknown(interpreter, eqn, operands)
  return list(operands)


@register_rule("bitcast_convert_type")
def bitcast_convert_type(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  """Between dtypes of one size it is elementwise; but the bits of -0.0 are no zero."""
  if len(shape_of(eqn.outvars[0])) != len(operands[0].axes):
    return unknown(interpreter, eqn, operands)
  return [Value(operands[0].axes, producers=operands[0].producers)]


def _zeroed_by(eqn: JaxprEqn, operands: Sequence[Value]) -> frozenset[ParamKey]:
  name = eqn.primitive.name
  if name in _ZERO_PRESERVING or (name == "integer_pow" and eqn.params["y"] > 0):
    return operands[0].zeroed_by if len(operands) == 1 else frozenset()
  if name == "mul":
    return union([operand.zeroed_by for operand in operands])
  if name == "div":
    return operands[0].zeroed_by
  return frozenset()


# ----------------------------------------------------------------------------------------------------------------------
# Shape
# ----------------------------------------------------------------------------------------------------------------------


@register_rule("broadcast_in_dim")
def broadcast_in_dim(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  axes = [Axis(size) for size in eqn.params["shape"]]
  for axis, dim in zip(operands[0].axes, eqn.params["broadcast_dimensions"], strict=True):
    if axis.size == axes[dim].size:
      axes[dim] = axis
  return [dataclasses.replace(operands[0], axes=tuple(axes))]


@register_rule("reshape")
def reshape(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  """Matches the smallest runs of dimensions with equal numbers of entries, as products."""
  results = [Axis(size) for size in shape_of(eqn.outvars[0])]
  if 0 in shape_of(eqn.outvars[0]):  # without entries there is nothing to match
    return unknown(interpreter, eqn, operands)
  order = eqn.params["dimensions"] or range(len(operands[0].axes))
  source = [axis for axis in (operands[0].axes[dim] for dim in order) if axis.size != 1]
  target = [axis for axis in results if axis.size != 1]
  while source and target:
    i = j = 1
    while (a := math.prod(x.size for x in source[:i])) != (b := math.prod(x.size for x in target[:j])):
      i, j = (i + 1, j) if a < b else (i, j + 1)
    unify(product(source[:i]), product(target[:j]))
    source, target = source[i:], target[j:]
  return [dataclasses.replace(operands[0], axes=tuple(results))]


@register_rule("transpose")
def transpose(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  return [dataclasses.replace(operands[0], axes=tuple(operands[0].axes[i] for i in eqn.params["permutation"]))]


@register_rule("squeeze")
def squeeze(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  gone = eqn.params["dimensions"]
  axes = tuple(axis for dim, axis in enumerate(operands[0].axes) if dim not in gone)
  return [dataclasses.replace(operands[0], axes=axes)]


@register_rule("concatenate")
def concatenate(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  along = eqn.params["dimension"]
  axes = list(operands[0].axes)
  for operand in operands[1:]:
    for dim, axis in enumerate(operand.axes):
      if dim != along:
        unify(axes[dim], axis)
  axes[along] = concatenation([operand.axes[along] for operand in operands])
  are_kernels = all(operand.zeroed_by and not operand.producers for operand in operands)
  interpreter.pieces[eqn.outvars[0]] = along, operands if are_kernels else ()
  return [Value(tuple(axes), producers=union([operand.producers for operand in operands]))]


@register_rule("stack")
def stack(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  axes = list(operands[0].axes)
  for operand in operands[1:]:
    for axis, other in zip(axes, operand.axes, strict=True):
      unify(axis, other)
  axes.insert(eqn.params["axis"], Axis(len(operands), fixed="arrays are stacked along it"))
  return [Value(tuple(axes), producers=union([operand.producers for operand in operands]))]


@register_rule("tile")
def tile(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  axes = []
  for times, axis in zip(eqn.params["reps"], operands[0].axes, strict=True):
    repetitions = Axis(times, fixed="it counts repetitions" if axis.size > 1 else None)
    axes.append(product([repetitions, axis]))
  return [Value(tuple(axes), producers=operands[0].producers)]


# ----------------------------------------------------------------------------------------------------------------------
# Pieces of axes
# ----------------------------------------------------------------------------------------------------------------------


def _divide(axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis]:
  """Returns the pieces of `axis`, which becomes their concatenation.

  Where nothing of `axis` can be cut they are new axes that are fixed for `reason`: pieces of space and time.
  """
  if all(atom.fixed for atom in atoms(axis)):
    return [Axis(size, fixed=reason) for size in sizes]
  pieces = [Axis(size) for size in sizes]
  unify(axis, concatenation(pieces))
  return pieces


@register_rule("split")
def split(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  (value,), along = operands, eqn.params["axis"]
  sizes = [shape_of(var)[along] for var in eqn.outvars]
  pieces = _divide(value.axes[along], sizes, "it is split at bounds that the model's code fixes")
  return [dataclasses.replace(value, axes=(*value.axes[:along], p, *value.axes[along + 1 :])) for p in pieces]


@register_rule("slice")
def slice_(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  """Divides a sliced axis; with a stride, it is fixed."""
  (value,), shape = operands, shape_of(eqn.outvars[0])
  starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
  reason = "it is sliced at bounds that the model's code fixes"
  axes, margins = [], []
  for axis, size, start, limit in zip(value.axes, shape, starts, limits, strict=True):
    before, after = Axis(int(start), fixed=reason), Axis(int(axis.size - limit), fixed=reason)
    result = axis
    if size != limit - start:
      fix(axis, reason)
      result = Axis(size, fixed=reason)
    elif size != axis.size:
      before, result, after = _divide(axis, (before.size, size, after.size), reason)
    axes.append(result)
    margins.append((before, after))
  interpreter.margins[interpreter.place] = tuple(margins)
  return [dataclasses.replace(value, axes=tuple(axes))]


@register_rule("pad")
def pad(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  """Adds channels of zeros at the ends of an axis; fixes an axis that is padded in another way.

  A channel of zeros can be cut with those that are added to it or concatenated with it.
  """
  value, filling = operands
  reason = "it is padded by a number of entries that the model's code fixes"
  axes, margins = [], []
  for axis, size, amounts in zip(value.axes, shape_of(eqn.outvars[0]), eqn.params["padding_config"], strict=True):
    before, after = (Axis(max(int(amount), 0)) for amount in amounts[:2])
    result = axis
    if any(amounts):
      is_exact = filling.is_zero and min(amounts) >= 0 and amounts[2] == 0
      if is_exact and not all(atom.fixed for atom in atoms(axis)):
        result = concatenation([before, axis, after])
      else:
        result = Axis(size, fixed=reason)
        for part in (axis, before, after):
          fix(part, reason)
    axes.append(result)
    margins.append((before, after))
  interpreter.margins[interpreter.place] = tuple(margins)
  zeroed_by = value.zeroed_by if filling.is_zero else frozenset()
  return [Value(tuple(axes), zeroed_by, value.producers | filling.producers)]


# ----------------------------------------------------------------------------------------------------------------------
# Primitives that act along some axes and leave the others alone
# ----------------------------------------------------------------------------------------------------------------------


def _replace_axes(result: Var, value: Value, touched: Sequence[bool], reason: str) -> Value:
  """Fixes the touched axes of `value` and gives it new, fixed ones in their place; keeps the others."""
  axes = []
  for axis, is_touched, size in zip(value.axes, touched, shape_of(result), strict=True):
    if is_touched:
      fix(axis, reason)
    axes.append(Axis(size, fixed=reason) if is_touched else axis)
  return Value(tuple(axes), producers=value.producers)


@register_rule(
  "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin"
)
def reduction(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  """Fixes what is reduced: a dropped channel need not be zero, nor would an average divide by the new number."""
  axes = []
  for dim, axis in enumerate(operands[0].axes):
    if dim in eqn.params["axes"]:
      fix(axis, f"`{eqn.primitive.name}` reduces over it, as a normalization over channels does")
    else:
      axes.append(axis)
  return [Value(tuple(axes), producers=operands[0].producers)]


@register_rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def cumulation(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  touched = [dim == eqn.params["axis"] for dim in range(len(operands[0].axes))]
  return [_replace_axes(eqn.outvars[0], operands[0], touched, f"`{eqn.primitive.name}` runs along it")]


@register_rule("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min")
def reduce_window(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  """Pooling: axes with a window of one are left alone."""
  if len(operands) > 2 or any(axis.size != 1 for operand in operands[1:] for axis in operand.axes):
    return unknown(interpreter, eqn, operands)
  ones = (1,) * len(operands[0].axes)
  params = {"base_dilation": ones, **eqn.params}
  factors = zip(params["window_dimensions"], params["window_strides"], params["base_dilation"] or ones, strict=True)
  touched = [set(f) != {1} or tuple(p) != (0, 0) for f, p in zip(factors, params["padding"], strict=True)]
  return [_replace_axes(eqn.outvars[0], operands[0], touched, "it is pooled over")]


@register_rule("fft")
def fft(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  """Transforms the last axes."""
  rank = len(operands[0].axes)
  touched = [dim >= rank - len(eqn.params["fft_lengths"]) for dim in range(rank)]
  return [_replace_axes(eqn.outvars[0], operands[0], touched, "a Fourier transform runs along it")]


@register_rule("dynamic_slice")
def dynamic_slice(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  shape = shape_of(eqn.outvars[0])
  touched = [axis.size != size for axis, size in zip(operands[0].axes, shape, strict=True)]
  return [_replace_axes(eqn.outvars[0], operands[0], touched, "it is sliced at bounds that are computed")]


@register_rule("gather")
def gather(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  """Keeps the axes that are taken whole; fixes the others, and those of the indices."""
  value, indices = operands
  numbers, taken = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
  reason = "its entries are picked by indices"
  gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
  results = list(fixed_axes(shape_of(eqn.outvars[0]), reason))
  places = iter(numbers.offset_dims)
  for dim, axis in enumerate(value.axes):
    place = None if dim in gone else next(places)
    if place is not None and taken[dim] == axis.size and dim not in numbers.start_index_map:
      results[place] = axis
    else:
      fix(axis, reason)
  for axis in indices.axes:
    fix(axis, reason)
  return [Value(tuple(results), producers=value.producers | indices.producers)]


@register_rule("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max")
def scatter(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  """Unifies the axes that are written whole with those of what is written; fixes the others, and those of the indices.

  A sum over the edges of a graph, or `x.at[i].set(y)`.
  """
  value, indices, updates = operands
  numbers = eqn.params["dimension_numbers"]
  reason = "its entries are written at indices"
  gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
  places = iter(numbers.update_window_dims)
  whole = set()
  for dim, axis in enumerate(value.axes):
    place = None if dim in gone else next(places)
    if place is not None and updates.axes[place].size == axis.size and dim not in numbers.scatter_dims_to_operand_dims:
      unify(axis, updates.axes[place])
      whole.add(place)
    else:
      fix(axis, reason)
  for axis in (*indices.axes, *(axis for place, axis in enumerate(updates.axes) if place not in whole)):
    fix(axis, reason)
  if value.producers and updates.producers - value.producers:
    for axis in value.axes:
      mark_joined(axis)
  return [Value(value.axes, producers=value.producers | updates.producers | indices.producers)]


@register_rule("rev")
def rev(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  touched = [dim in eqn.params["dimensions"] for dim in range(len(operands[0].axes))]
  # Reversal moves zeros along the reversed axes only, so on the others the value still inherits them.
  value = _replace_axes(eqn.outvars[0], operands[0], touched, "it is reversed")
  return [dataclasses.replace(value, zeroed_by=operands[0].zeroed_by)]


@register_rule("iota", "rng_bit_generator", "random_seed", "random_wrap")
def constant(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  return [Value(fixed_axes(shape_of(var), "it indexes a constant")) for var in eqn.outvars]


@register_rule("random_bits")
def random_bits(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  if not interpreter.training:
    return constant(interpreter, eqn, operands)
  return [Value(tuple(map(Axis, shape_of(var)))) for var in eqn.outvars]
