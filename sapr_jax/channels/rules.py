"""What each JAX primitive says about channels: one small rule per primitive.

A rule gets the `Walk`, an equation of the jaxpr and the `Value`s of its operands, and returns the `Value`s of its
results, having called `unify` and `fix` on the way. A primitive without a rule fixes every axis it touches: never
wrong, at worst less prunable. `register_rule` adds one for a primitive that this package does not know.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from sapr_jax.channels.atoms import Axis, concatenation, fix, mark_joined, product, unify

ParamKey = tuple[str, ...]
"""Where a variable lies: its collection, then the names of modules, then its own: ("params", "conv1", "kernel")."""


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
    repetitions: How often the code now walked runs for one image (the length of enclosing scans).
    next_producer: Id of the next layer; the network's input has id 0.
    walk_jaxpr: Walks an inner jaxpr: (jaxpr, consts, operand values) -> result values.
  """

  walk_jaxpr: Callable[[Any, Sequence[Any], Sequence[Value]], list[Value]]
  contractions: list[Contraction] = dataclasses.field(default_factory=list)
  repetitions: int = 1
  next_producer: int = 1

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


def apply_rule(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  """Returns the values of `eqn`'s results by the rule of its primitive, or by `unknown`."""
  return RULES.get(eqn.primitive.name, unknown)(walk, eqn, operands)


def fixed_axes(shape: Sequence[int], reason: str) -> tuple[Axis, ...]:
  """Returns new axes that must keep their size."""
  return tuple(Axis(size, fixed=reason) for size in shape)


def _union(sets: Sequence[frozenset]) -> frozenset:
  return frozenset().union(*sets)


def unknown(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  """Fixes all axes of the operands; the results' axes are new and fixed."""
  reason = f"it goes through `{eqn.primitive.name}`, for which there is no rule"
  for operand in operands:
    for axis in operand.axes:
      fix(axis, reason)
  producers = _union([operand.producers for operand in operands])
  return [Value(fixed_axes(var.aval.shape, reason), producers=producers) for var in eqn.outvars]


# ----------------------------------------------------------------------------------------------------------------------
# Elementwise
# ----------------------------------------------------------------------------------------------------------------------

# f(0) = 0, so a masked kernel stays masked through them.
_ZERO_PRESERVING = frozenset(
  {
    *("neg", "abs", "sign", "sqrt", "cbrt", "square", "tanh", "sin", "tan", "sinh", "asin", "atan", "asinh", "atanh"),
    *("expm1", "log1p", "erf", "floor", "ceil", "round", "convert_element_type", "reduce_precision", "real"),
    *("copy", "copy_p", "optimization_barrier", "stop_gradient"),
  }
)
_OTHER_ELEMENTWISE = (
  *("exp", "exp2", "log", "cos", "cosh", "acos", "acosh", "rsqrt", "logistic", "erfc", "erf_inv", "lgamma", "digamma"),
  *("igamma", "igammac", "bessel_i0e", "bessel_i1e", "imag", "conj", "complex", "is_finite", "clz", "population_count"),
  *("add", "add_any", "sub", "max", "min", "mul", "div", "rem", "pow", "integer_pow", "atan2", "nextafter", "clamp"),
  *("select_n", "not", "and", "or", "xor", "eq", "ne", "lt", "le", "gt", "ge", "eq_to", "lt_to", "le_to"),
  *("shift_left", "shift_right_logical", "shift_right_arithmetic"),
)
# Scaling one activation by another (a gate, squeeze-and-excitation) is no residual stream.
_NOT_JOINING = frozenset({"mul", "div"})


@register_rule(*_ZERO_PRESERVING, *_OTHER_ELEMENTWISE)
def elementwise(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  """Unifies the axes of the operands, except those that are broadcast (scalars, size 1)."""
  shape = eqn.outvars[0].aval.shape
  full = [operand for operand in operands if len(operand.axes) == len(shape)]
  axes = []
  for dim, size in enumerate(shape):
    same = [operand.axes[dim] for operand in full if operand.axes[dim].size == size]
    for other in same[1:]:
      unify(same[0], other)
    axes.append(same[0])
  if eqn.primitive.name not in _NOT_JOINING and len({o.producers for o in full if o.producers}) > 1:
    for axis in axes:
      mark_joined(axis)
  producers = _union([operand.producers for operand in operands])
  return [Value(tuple(axes), _zeroed_by(eqn, operands), producers) for _ in eqn.outvars]


def _zeroed_by(eqn: Any, operands: Sequence[Value]) -> frozenset[ParamKey]:
  name = eqn.primitive.name
  if name in _ZERO_PRESERVING or (name == "integer_pow" and eqn.params["y"] > 0):
    return operands[0].zeroed_by if len(operands) == 1 else frozenset()
  if name == "mul":
    return _union([operand.zeroed_by for operand in operands])
  if name == "div":
    return operands[0].zeroed_by
  return frozenset()


# ----------------------------------------------------------------------------------------------------------------------
# Shape
# ----------------------------------------------------------------------------------------------------------------------


@register_rule("broadcast_in_dim")
def broadcast_in_dim(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  axes = [Axis(size) for size in eqn.params["shape"]]
  for axis, dim in zip(operands[0].axes, eqn.params["broadcast_dimensions"], strict=True):
    if axis.size == axes[dim].size:
      axes[dim] = axis
  return [dataclasses.replace(operands[0], axes=tuple(axes))]


@register_rule("reshape")
def reshape(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  """Matches the smallest runs of dimensions with equal numbers of entries, as products."""
  results = [Axis(size) for size in eqn.outvars[0].aval.shape]
  source = [axis for axis in operands[0].axes if axis.size != 1]
  target = [axis for axis in results if axis.size != 1]
  while source and target:
    i = j = 1
    while (a := math.prod(x.size for x in source[:i])) != (b := math.prod(x.size for x in target[:j])):
      i, j = (i + 1, j) if a < b else (i, j + 1)
    unify(product(source[:i]), product(target[:j]))
    source, target = source[i:], target[j:]
  return [dataclasses.replace(operands[0], axes=tuple(results))]


@register_rule("transpose")
def transpose(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  return [dataclasses.replace(operands[0], axes=tuple(operands[0].axes[i] for i in eqn.params["permutation"]))]


@register_rule("squeeze")
def squeeze(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  gone = eqn.params["dimensions"]
  axes = tuple(axis for dim, axis in enumerate(operands[0].axes) if dim not in gone)
  return [dataclasses.replace(operands[0], axes=axes)]


@register_rule("concatenate")
def concatenate(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  along = eqn.params["dimension"]
  axes = list(operands[0].axes)
  for operand in operands[1:]:
    for dim, axis in enumerate(operand.axes):
      if dim != along:
        unify(axes[dim], axis)
  axes[along] = concatenation([operand.axes[along] for operand in operands])
  return [Value(tuple(axes), producers=_union([operand.producers for operand in operands]))]


# ----------------------------------------------------------------------------------------------------------------------
# Primitives that act along some axes and leave the others alone
# ----------------------------------------------------------------------------------------------------------------------


def _replace_axes(eqn: Any, value: Value, touched: Sequence[bool], reason: str) -> Value:
  """Fixes the touched axes of `value` and gives it new, fixed ones in their place; keeps the others."""
  axes = []
  for axis, is_touched, size in zip(value.axes, touched, eqn.outvars[0].aval.shape, strict=True):
    if is_touched:
      fix(axis, reason)
    axes.append(Axis(size, fixed=reason) if is_touched else axis)
  return Value(tuple(axes), producers=value.producers)


@register_rule(
  "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin"
)
def reduction(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  """Fixes what is reduced: a dropped channel need not be zero, nor would an average divide by the new number."""
  axes = []
  for dim, axis in enumerate(operands[0].axes):
    if dim in eqn.params["axes"]:
      fix(axis, f"`{eqn.primitive.name}` reduces over it, as a normalization over channels does")
    else:
      axes.append(axis)
  return [Value(tuple(axes), producers=operands[0].producers)]


@register_rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def cumulation(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  touched = [dim == eqn.params["axis"] for dim in range(len(operands[0].axes))]
  return [_replace_axes(eqn, operands[0], touched, f"`{eqn.primitive.name}` runs along it")]


@register_rule("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min")
def reduce_window(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  """Pooling: axes with a window of one are left alone."""
  if len(operands) > 2 or any(axis.size != 1 for operand in operands[1:] for axis in operand.axes):
    return unknown(walk, eqn, operands)
  params = eqn.params
  dims = range(len(operands[0].axes))
  base = params.get("base_dilation") or [1] * len(dims)
  touched = [
    params["window_dimensions"][i] != 1
    or params["window_strides"][i] != 1
    or tuple(params["padding"][i]) != (0, 0)
    or base[i] != 1
    for i in dims
  ]
  return [_replace_axes(eqn, operands[0], touched, "it is pooled over")]


@register_rule("pad")
def pad(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  """Fixes a padded axis: the amount is a number in the model's code, which pruning cannot change."""
  touched = [tuple(amounts) != (0, 0, 0) for amounts in eqn.params["padding_config"]]
  return [_replace_axes(eqn, operands[0], touched, "it is padded by a number of entries that the model's code fixes")]


@register_rule("slice")
def slice_(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  """Fixes a sliced axis: the bounds are numbers in the model's code."""
  shape = eqn.outvars[0].aval.shape
  touched = [axis.size != size for axis, size in zip(operands[0].axes, shape, strict=True)]
  return [_replace_axes(eqn, operands[0], touched, "it is sliced at bounds that the model's code fixes")]


@register_rule("dynamic_slice")
def dynamic_slice(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  return slice_(walk, eqn, operands[:1])


@register_rule("split")
def split(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  reason = "it is split at bounds that the model's code fixes"
  along = eqn.params["axis"]
  fix(operands[0].axes[along], reason)
  return [
    Value(
      tuple(
        Axis(var.aval.shape[dim], fixed=reason) if dim == along else axis for dim, axis in enumerate(operands[0].axes)
      ),
      producers=operands[0].producers,
    )
    for var in eqn.outvars
  ]


@register_rule("rev")
def rev(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  touched = [dim in eqn.params["dimensions"] for dim in range(len(operands[0].axes))]
  # Reversal moves zeros along the reversed axes only, so on the others the value still inherits them.
  value = _replace_axes(eqn, operands[0], touched, "it is reversed")
  return [dataclasses.replace(value, zeroed_by=operands[0].zeroed_by)]


@register_rule("iota", "rng_bit_generator", "random_bits", "random_seed", "random_wrap")
def constant(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  del operands
  return [Value(fixed_axes(var.aval.shape, "it indexes a constant")) for var in eqn.outvars]


# ----------------------------------------------------------------------------------------------------------------------
# Contractions
# ----------------------------------------------------------------------------------------------------------------------


@register_rule("conv_general_dilated")
def conv_general_dilated(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  """Ties the kernel's input axis to the operand, its output axis to the result; a depthwise one ties all three."""
  params = eqn.params
  if params["batch_group_count"] != 1:
    return unknown(walk, eqn, operands)
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

  shape = eqn.outvars[0].aval.shape
  out: list[Axis] = list(fixed_axes(shape, "it is a spatial dimension of a convolution"))
  out[numbers.out_spec[0]], out[numbers.out_spec[1]] = batch, kernel_out
  # Each input position of a transposed convolution meets the whole window; of an ordinary one, each output position.
  dilated = any(dilation != 1 for dilation in params["lhs_dilation"])
  positions = [a.size for a in space] if dilated else [shape[i] for i in numbers.out_spec[2:]]
  producers = lhs.producers | rhs.producers
  if producers:
    walk.contractions.append(
      Contraction(
        kernel=rhs.zeroed_by,
        reduced=((feature, kernel_in),) if multiplier is None else (),
        free=(kernel_out,),
        factors=(kernel_in, kernel_out),
        constant=walk.repetitions * math.prod(positions) * math.prod(axis.size for axis in window),
        multiplier=multiplier,
      )
    )
  return [Value(tuple(out), producers=walk.new_producer() if producers else frozenset())]


@register_rule("dot_general")
def dot_general(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  """Unifies the contracted and the batch axes of the operands; the kernel is the operand that a variable zeroes."""
  lhs, rhs = operands
  (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
  for i, j in (*zip(lhs_contract, rhs_contract, strict=True), *zip(lhs_batch, rhs_batch, strict=True)):
    unify(lhs.axes[i], rhs.axes[j])
  lhs_free = [axis for i, axis in enumerate(lhs.axes) if i not in (*lhs_contract, *lhs_batch)]
  rhs_free = [axis for j, axis in enumerate(rhs.axes) if j not in (*rhs_contract, *rhs_batch)]
  batch = [lhs.axes[i] for i in lhs_batch]
  contracted = [(lhs.axes[i], rhs.axes[j]) for i, j in zip(lhs_contract, rhs_contract, strict=True)]

  kernel, free = rhs.zeroed_by, rhs_free
  if not kernel and lhs.zeroed_by:
    kernel, free = lhs.zeroed_by, lhs_free
    contracted = [(b, a) for a, b in contracted]
  producers = lhs.producers | rhs.producers
  # A product of two kernels is a kernel: it costs nothing per image and is zero where either of them is.
  if not producers:
    for axis, _ in contracted:
      fix(axis, "two variables are multiplied along it")
    return [Value((*batch, *lhs_free, *rhs_free), lhs.zeroed_by | rhs.zeroed_by)]
  walk.contractions.append(
    Contraction(
      kernel=kernel,
      reduced=tuple(contracted),
      free=tuple(free),
      factors=(*batch, *(axis for axis, _ in contracted), *lhs_free, *rhs_free),
      constant=walk.repetitions,
    )
  )
  return [Value((*batch, *lhs_free, *rhs_free), producers=walk.new_producer())]


# ----------------------------------------------------------------------------------------------------------------------
# Primitives that hold a jaxpr
# ----------------------------------------------------------------------------------------------------------------------


def inner_jaxprs(eqn: Any) -> list[tuple[Any, Sequence[Any]]]:
  """Returns the jaxprs among the parameters of `eqn`, each with its constants."""
  found: list[tuple[Any, Sequence[Any]]] = []
  for param in eqn.params.values():
    for candidate in param if isinstance(param, list | tuple) else (param,):
      if hasattr(candidate, "jaxpr") and hasattr(candidate, "consts"):
        found.append((candidate.jaxpr, candidate.consts))
      elif hasattr(candidate, "eqns") and hasattr(candidate, "invars"):
        found.append((candidate, ()))
  return found


@register_rule(
  "jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call",
  "custom_vjp_call_jaxpr",
)  # fmt: skip
def call(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  inner = inner_jaxprs(eqn)
  if len(inner) != 1 or len(inner[0][0].invars) != len(operands):
    return unknown(walk, eqn, operands)
  return walk.walk_jaxpr(*inner[0], operands)


@register_rule("scan")
def scan(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  """Walks the body once: what is carried keeps its channels, what is stacked has them in every slice."""
  ((jaxpr, consts),) = inner_jaxprs(eqn)
  num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
  num_fixed = num_consts + num_carry
  sliced = []
  for value in operands[num_fixed:]:
    fix(value.axes[0], "a scan runs along it")
    sliced.append(dataclasses.replace(value, axes=value.axes[1:]))
  carry = [dataclasses.replace(value, zeroed_by=frozenset()) for value in operands[num_consts:num_fixed]]
  length = int(eqn.params["length"])
  walk.repetitions *= length
  results = walk.walk_jaxpr(jaxpr, consts, [*operands[:num_consts], *carry, *sliced])
  walk.repetitions //= max(length, 1)
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


@register_rule("cond", "while")
def control_flow(walk: Walk, eqn: Any, operands: Sequence[Value]) -> list[Value]:
  """Fixes all it touches; counts the costliest branch of a `cond`, and one turn of a `while`."""
  results = unknown(walk, eqn, operands)
  best: list[Contraction] = []
  for jaxpr, consts in inner_jaxprs(eqn):
    before = len(walk.contractions)
    producers = _union([operand.producers for operand in operands])
    reason = f"it goes through `{eqn.primitive.name}`"
    walk.walk_jaxpr(
      jaxpr, consts, [Value(fixed_axes(var.aval.shape, reason), producers=producers) for var in jaxpr.invars]
    )
    branch = walk.contractions[before:]
    del walk.contractions[before:]
    if _total(branch) > _total(best):
      best = branch
  walk.contractions.extend(best)
  return results


def _total(contractions: Sequence[Contraction]) -> int:
  return sum(c.constant * math.prod(axis.size for axis in c.factors) for c in contractions)
