"""What the kernels that read channels see: sums over the inputs of a network, taken while its program is evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from sapr_jax.channels.call import Call, abstract_arrays
from sapr_jax.channels.graph import ChannelGraph
from sapr_jax.channels.narrow_program import INLINED, evaluate_alone
from sapr_jax.channels.program import FrontEnd
from sapr_jax.channels.rules import ParamKey, closed_jaxprs
from sapr_jax.channels.trees import path_of

Moments = Mapping[ParamKey, Any]
"""Kernel that reads a group -> sum of y y^T over all positions of its input, `[n + 1, n + 1]` for n input channels.

y is the input x with a 1 behind it, so that the last row has the sums of x, and the last entry counts the positions.
"""

_SAME_NUMBERS = frozenset({"convert_element_type", "copy", "copy_p", "optimization_barrier", "sharding_constraint"})
"""Primitives whose result is the kernel, up to its dtype."""

_WIDEST = 8192
"""Input channels of a kernel that is looked at: the moments of more take gigabytes."""


def moments_of_call(
  front_end: FrontEnd, model: Any, variables: Mapping[str, Any], graph: ChannelGraph, arrays: Sequence[Any]
) -> dict[ParamKey, jax.Array]:
  """Evaluates the network on the arrays of a call; returns the moments of each kernel whose input is a plain one.

  That is a kernel of a convolution, in which a channel is read by its own weights alone, or of a matrix product over
  the channels, of real numbers. A kernel that is used otherwise besides has none.
  """
  call = Call(*abstract_arrays(graph.call.filled(arrays)))
  closed = front_end.trace(model, variables, call).closed
  leaves = jax.tree_util.tree_leaves_with_path(dict(variables))
  axes = {("params", *m.path): m.axis for group in graph.groups for m in group.members if m.role == "in"}
  sources = [key if _is_floating(leaf) and (key := path_of(place)) in axes else None for place, leaf in leaves]
  found = _Found(axes)
  found.run(closed, [*(leaf for _, leaf in leaves), *arrays], [*sources, *(None for _ in arrays)])
  return {key: moments for key, moments in found.moments.items() if key not in found.unclear}


class _Found:
  """Evaluates jaxprs and collects moments.

  Attributes:
    axes: Kernel -> its axis of input channels.
    moments: Kernel -> the sum so far.
    unclear: Kernels that are used in another way.
  """

  def __init__(self, axes: Mapping[ParamKey, int]):
    self.axes, self.moments = axes, dict[ParamKey, jax.Array]()
    self.unclear: set[ParamKey] = set()

  def run(
    self, closed: ClosedJaxpr, operands: Sequence[Any], sources: Sequence[ParamKey | None]
  ) -> tuple[list[Any], list[ParamKey | None]]:
    """Evaluates a jaxpr; returns its results, and which of them are kernels as they were."""
    jaxpr = closed.jaxpr
    values: dict[Var, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *operands), strict=True))
    kernels = {var: key for var, key in zip(jaxpr.invars, sources, strict=True) if key is not None}

    def read(var: Var | Literal) -> Any:
      return var.val if isinstance(var, Literal) else values[var]

    def kernel(var: Var | Literal) -> ParamKey | None:
      return None if isinstance(var, Literal) else kernels.get(var)

    for eqn in jaxpr.eqns:
      inputs, known = list(map(read, eqn.invars)), list(map(kernel, eqn.invars))
      if eqn.primitive.name in INLINED:
        (inner,) = closed_jaxprs(eqn)
        results, keys = self.run(inner, inputs, known)
      else:
        results, keys = evaluate_alone(eqn, *inputs), [None for _ in eqn.outvars]
        if eqn.primitive.name in _SAME_NUMBERS:
          keys = known[: len(results)]
        else:
          self._note(eqn, inputs, known)
      values.update(zip(eqn.outvars, results, strict=True))
      kernels.update((var, key) for var, key in zip(eqn.outvars, keys, strict=True) if key is not None)
    return list(map(read, jaxpr.outvars)), list(map(kernel, jaxpr.outvars))

  def _note(self, eqn: JaxprEqn, inputs: Sequence[Any], known: Sequence[ParamKey | None]) -> None:
    """Adds the moments of the input that a kernel is applied to."""
    for i, key in enumerate(known):
      if key is None:
        continue
      axis = _axis_of_input(eqn, i, self.axes[key])
      if axis is None or not _is_floating(inputs[1 - i]) or np.shape(inputs[i])[self.axes[key]] > _WIDEST:
        self.unclear.add(key)
        continue
      x = jnp.moveaxis(inputs[1 - i], axis, -1)
      x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
      x = jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1)
      moments = jnp.matmul(x.T, x, precision="highest")
      self.moments[key] = self.moments[key] + moments if key in self.moments else moments


def _is_floating(array: Any) -> bool:
  return jnp.issubdtype(array.dtype, jnp.floating)


def _axis_of_input(eqn: JaxprEqn, kernel: int, axis: int) -> int | None:
  """Returns which axis of the other operand meets axis `axis` of the kernel, operand number `kernel`.

  None if the equation is no product in which that axis alone is summed over, besides the positions of a window.
  """
  params = eqn.params
  if eqn.primitive.name == "conv_general_dilated" and kernel == 1:
    numbers = params["dimension_numbers"]
    is_plain = params["feature_group_count"] == params["batch_group_count"] == 1
    return numbers.lhs_spec[1] if is_plain and numbers.rhs_spec[1] == axis else None
  if eqn.primitive.name == "dot_general":
    contracted, batched = params["dimension_numbers"]
    is_plain = tuple(contracted[kernel]) == (axis,) and not batched[kernel]
    return contracted[1 - kernel][0] if is_plain else None
  return None
