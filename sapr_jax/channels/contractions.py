"""Rules for convolutions and matrix products, and for primitives that hold a jaxpr."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from sapr_jax.channels.atoms import Axis, fix, product, unify
from sapr_jax.channels.rules import (
  AxisInterpreter,
  Contraction,
  Value,
  fixed_axes,
  inner_jaxprs,
  register_rule,
  shape_of,
  union,
  unknown,
)

# ----------------------------------------------------------------------------------------------------------------------
# Contractions
# ----------------------------------------------------------------------------------------------------------------------


@register_rule("conv_general_dilated")
def conv_general_dilated(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  """Ties the kernel's input axis to the operand and its output axis to the result; if depthwise, all three."""
  params = eqn.params
  if params["batch_group_count"] != 1:
    return unknown(interpreter, eqn, operands)
  lhs, rhs = operands
  numbers = params["dimension_numbers"]
  batch, feature, *space = (lhs.axes[i] for i in numbers.lhs_spec)
  kernel_out, kernel_in, *window = (rhs.axes[i] for i in numbers.rhs_spec)
  for axis in (*space, *window):
    fix(axis, "it is a spatial dimension of a convolution")

  groups, multiplier = params["feature_group_count"], None
  if groups == 1:
    unify(feature, kernel_in)
  else:
    group, depthwise = Axis(groups), kernel_in.size == 1
    multiplier = kernel_out.size // groups if depthwise else None
    if not depthwise:
      fix(group, "it counts the groups of a grouped convolution")
    per_group = Axis(kernel_out.size // groups, fixed="it multiplies the channels of a depthwise convolution")
    unify(feature, product([group, kernel_in]))
    unify(kernel_out, product([group, per_group if depthwise else Axis(per_group.size)]))

  shape = shape_of(eqn.outvars[0])
  out: list[Axis] = list(fixed_axes(shape, "it is a spatial dimension of a convolution"))
  out[numbers.out_spec[0]], out[numbers.out_spec[1]] = batch, kernel_out
  # Each input position of a transposed convolution meets the whole window; of an ordinary one, each output position.
  dilated = any(dilation != 1 for dilation in params["lhs_dilation"])
  positions = [a.size for a in space] if dilated else [shape[i] for i in numbers.out_spec[2:]]
  producers = lhs.producers | rhs.producers
  if not producers:
    for axis in (feature, kernel_in):
      fix(axis, "two variables are convolved along it")
  else:
    interpreter.contractions.append(
      Contraction(
        kernel=frozenset() if rhs.producers else rhs.zeroed_by,
        reduced=((feature, kernel_in),) if multiplier is None else (),
        free=(kernel_out,),
        factors=(kernel_in, kernel_out),
        constant=interpreter.repetitions * math.prod(positions) * math.prod(axis.size for axis in window),
        multiplier=multiplier,
      )
    )
  return [Value(tuple(out), producers=interpreter.new_producer() if producers else frozenset())]


@register_rule("dot_general")
def dot_general(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  """Unifies the contracted and the batch axes of the operands. The operand that is a variable is the kernel."""
  lhs, rhs = operands
  (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
  for i, j in (*zip(lhs_contract, rhs_contract, strict=True), *zip(lhs_batch, rhs_batch, strict=True)):
    unify(lhs.axes[i], rhs.axes[j])
  left, right = (lhs, lhs_contract, lhs_batch), (rhs, rhs_contract, rhs_batch)
  batch = [lhs.axes[i] for i in lhs_batch]
  axes = (*batch, *_free(*left), *_free(*right))
  # A product of two kernels is a kernel: it costs nothing per image and is zero where either of them is.
  if not lhs.producers | rhs.producers:
    for i in lhs_contract:
      fix(lhs.axes[i], "two variables are multiplied along it")
    return [Value(axes, lhs.zeroed_by | rhs.zeroed_by)]
  kernels, other, own = _kernels(interpreter, eqn.invars[1], *right), left, right
  if not kernels and (found := _kernels(interpreter, eqn.invars[0], *left)):
    kernels, other, own = found, right, left
  for kernel in kernels or [Value(rhs.axes)]:
    contracted = [(other[0].axes[i], kernel.axes[j]) for i, j in zip(other[1], own[1], strict=True)]
    free = _free(kernel, *own[1:])
    interpreter.contractions.append(
      Contraction(
        kernel=kernel.zeroed_by,
        reduced=tuple(contracted),
        free=tuple(free),
        factors=(*batch, *(axis for axis, _ in contracted), *_free(*other), *free),
        constant=interpreter.repetitions,
      )
    )
  return [Value(axes, producers=interpreter.new_producer())]


def _free(value: Value, contract: Sequence[int], batch: Sequence[int]) -> list[Axis]:
  """Returns the axes of an operand that are neither contracted nor of the batch."""
  return [axis for i, axis in enumerate(value.axes) if i not in (*contract, *batch)]


def _kernels(
  interpreter: AxisInterpreter, operand: Var | Literal, value: Value, contract: Sequence[int], batch: Sequence[int]
) -> Sequence[Value]:
  """Returns the kernel that an operand is, or those that were concatenated to it along a free axis; else nothing."""
  along, pieces = interpreter.pieces.get(operand, (0, ())) if isinstance(operand, Var) else (0, ())
  if pieces and along not in (*contract, *batch):
    return pieces
  return [value] if value.zeroed_by and not value.producers else []


# ----------------------------------------------------------------------------------------------------------------------
# Primitives that hold a jaxpr
# ----------------------------------------------------------------------------------------------------------------------


@register_rule(
  "jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call",
  "custom_vjp_call_jaxpr",
)  # fmt: skip
def call(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  inner = inner_jaxprs(eqn)
  if len(inner) != 1 or len(inner[0].invars) != len(operands):
    return unknown(interpreter, eqn, operands)
  return interpreter.run(inner[0], operands)


@register_rule("scan")
def scan(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  """Runs the body once: what is carried keeps its channels, what is stacked has them in every slice."""
  (jaxpr,) = inner_jaxprs(eqn)
  num_consts, num_carry = scan_numbers(eqn, jaxpr)
  num_fixed = num_consts + num_carry
  sliced = []
  for value in operands[num_fixed:]:
    fix(value.axes[0], "a scan runs along it")
    sliced.append(dataclasses.replace(value, axes=value.axes[1:]))
  # A carry that starts as a constant may depend on the input after one iteration.
  everything = union([operand.producers for operand in operands])
  carry = [
    Value(value.axes, producers=value.producers or (everything if value.axes else frozenset()))
    for value in operands[num_consts:num_fixed]
  ]
  length = int(eqn.params["length"])
  interpreter.repetitions *= length
  results = interpreter.run(jaxpr, [*operands[:num_consts], *carry, *sliced])
  interpreter.repetitions //= max(length, 1)
  for before, after in zip(carry, results[:num_carry], strict=True):
    for a, b in zip(before.axes, after.axes, strict=True):
      unify(a, b)
  outputs = [
    Value(v.axes, producers=v.producers | c.producers) for v, c in zip(results[:num_carry], carry, strict=True)
  ]
  for value in results[num_carry:]:
    axes = (Axis(length, fixed="a scan stacks along it"), *value.axes)
    outputs.append(Value(axes, producers=value.producers))
  return outputs


def scan_numbers(eqn: JaxprEqn, jaxpr: Jaxpr) -> tuple[int, int]:
  """Returns how many arrays a scan passes to each iteration as they are, and how many it carries along.

  Stacked arrays have one dimension more outside than inside. Counted, as JAX releases name the numbers differently.
  """
  num_carry = sum(len(shape_of(a)) == len(shape_of(b)) for a, b in zip(eqn.outvars, jaxpr.outvars, strict=True))
  num_fixed = sum(len(shape_of(a)) == len(shape_of(b)) for a, b in zip(eqn.invars, jaxpr.invars, strict=True))
  return num_fixed - num_carry, num_carry


@register_rule("cond", "while")
def control_flow(interpreter: AxisInterpreter, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
  """Fixes all it touches; counts the costliest branch of a `cond`, and one iteration of a `while`."""
  results = unknown(interpreter, eqn, operands)
  best: list[Contraction] = []
  producers = union([operand.producers for operand in operands])
  reason = f"it goes through `{eqn.primitive.name}`"
  for jaxpr in inner_jaxprs(eqn):
    before = len(interpreter.contractions)
    interpreter.run(jaxpr, [Value(fixed_axes(shape_of(var), reason), producers=producers) for var in jaxpr.invars])
    branch = interpreter.contractions[before:]
    del interpreter.contractions[before:]
    best = max(best, branch, key=lambda found: sum(contraction.macs for contraction in found))
  interpreter.contractions.extend(best)
  return results
