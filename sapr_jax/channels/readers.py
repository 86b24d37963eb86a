"""What the kernels that read channels see and give: sums over inputs of a network, taken while its program runs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from sapr_jax.channels.call import Call, abstract_arrays
from sapr_jax.channels.graph import ChannelGraph, Masks
from sapr_jax.channels.narrow_program import INLINED, evaluate_alone
from sapr_jax.channels.program import FrontEnd
from sapr_jax.channels.rules import ParamKey, closed_jaxprs
from sapr_jax.channels.trees import path_of

_SAME_NUMBERS = frozenset({"convert_element_type", "copy", "copy_p", "optimization_barrier", "sharding_constraint"})
"""Primitives whose result is the kernel, up to its dtype."""

_WIDEST = 8192
"""Kept weights of an output channel that are looked at: the moments of more take gigabytes."""
_AT_ONCE = 2**25
"""Numbers in the windows of the images that are laid out at once: 128 MiB in float32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
  """Sums over all positions of one kernel that reads channels.

  An output is a sum over some axes of the kernel, its *features*: input channels, and the window of a convolution. y is
  what the kernel sees at a position of its f kept features, and a 1 behind that. z `[c]` is the part of its outputs
  that comes from those that are dropped.

  Attributes:
    seen: Sum of y y^T, `[f + 1, f + 1]`: the last row has the sums of what is seen, and how many positions there are.
    missing: Sum of y z^T, `[f + 1, c]`.
    axes: The kernel's axes of features, ascending.
  """

  seen: Any
  missing: Any
  axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def kept_weights(graph: ChannelGraph, masks: Masks) -> dict[ParamKey, np.ndarray]:
  """Returns which weights stay of each kernel that loses input channels, but not all: of a shape that broadcasts."""
  found = {}
  for path, members in graph.members_by_variable("params").items():
    kept = np.array(True)
    for name, member in members:
      if member.role == "in":
        kept = kept & (member.along_axis(np.asarray(masks[name], np.float32), 1) > 0)
    if kept.any() and not kept.all():
      found["params", *path] = kept
  return found


def kept_features(kept: np.ndarray, shape: Sequence[int], axes: Sequence[int]) -> np.ndarray:
  """Returns which features of a kernel of such a shape stay, flattened, from one of `kept_weights`: bool `[...]`."""
  sizes = [shape[axis] if axis in axes else 1 for axis in range(len(shape))]
  return np.broadcast_to(kept, sizes).reshape(-1)


def moments_of_call(
  front_end: FrontEnd,
  model: Any,
  variables: Mapping[str, Any],
  graph: ChannelGraph,
  kept: Mapping[ParamKey, np.ndarray],
  arrays: Sequence[Any],
) -> dict[ParamKey, Moments]:
  """Evaluates the network on the arrays of a call; returns the moments of each kernel of `kept` that is used plainly.

  That is a convolution or a matrix product of real numbers, in which dropped channels are summed over. A kernel that is
  used otherwise besides has none.
  """
  call = Call(*abstract_arrays(graph.call.filled(arrays)))
  closed = front_end.trace(model, variables, call).closed
  leaves = jax.tree_util.tree_leaves_with_path(dict(variables))
  sources = [key if _is_floating(leaf) and (key := path_of(place)) in kept else None for place, leaf in leaves]
  found = _Found(kept)
  found.run(closed, [*(leaf for _, leaf in leaves), *arrays], [*sources, *(None for _ in arrays)])
  return {key: moments for key, moments in found.moments.items() if key not in found.unclear}


class _Found:
  """Evaluates jaxprs and collects moments.

  Attributes:
    kept: Kernel -> which of its weights stay.
    moments: Kernel -> the sums so far.
    unclear: Kernels that are used in another way.
  """

  def __init__(self, kept: Mapping[ParamKey, np.ndarray]):
    self.kept, self.moments = kept, dict[ParamKey, Moments]()
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
    """Adds the moments of a kernel that is applied to something."""
    for i, key in enumerate(known):
      if key is None:
        continue
      moments, before = _moments(eqn, inputs, i, self.kept[key]), self.moments.get(key)
      if moments is None or (before is not None and before.axes != moments.axes):
        self.unclear.add(key)
      else:
        self.moments[key] = moments if before is None else jax.tree.map(jnp.add, before, moments)


def _moments(eqn: JaxprEqn, inputs: Sequence[Any], i: int, kept: np.ndarray) -> Moments | None:
  """Returns the moments of the kernel that is operand i of an equation; None if it is no plain use."""
  kernel = inputs[i]
  axes = _feature_axes(eqn, i)
  is_plain = all(size == 1 or axis in axes for axis, size in enumerate(kept.shape))
  if not is_plain or not all(map(_is_floating, inputs)):
    return None
  stays = kept_features(kept, kernel.shape, axes)
  if stays.sum() > _WIDEST:
    return None
  dropped = [*inputs]
  dropped[i] = jnp.where(kept, 0, kernel)
  (missing,) = evaluate_alone(eqn, *dropped)
  if eqn.primitive.name == "conv_general_dilated":
    numbers = eqn.params["dimension_numbers"]
    x = _channels_last(inputs[0], numbers.lhs_spec)[..., np.flatnonzero(kept)]
    return Moments(*_sums_over_windows(eqn, x, _channels_last(missing, numbers.out_spec), kernel.shape), axes)
  pairs = sorted(zip(*(eqn.params["dimension_numbers"][0][side] for side in (i, 1 - i)), strict=True))
  seen = jnp.moveaxis(inputs[1 - i], [axis for _, axis in pairs], range(-len(pairs), 0))
  seen = seen.reshape(-1, stays.size)[:, np.flatnonzero(stays)]
  outputs = kernel.ndim - len(axes)
  missing = missing if i == 1 else jnp.moveaxis(missing, range(outputs), range(-outputs, 0))
  return Moments(*_sums(seen, missing.reshape(len(seen), -1)), axes)


def _sums(seen: jax.Array, missing: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the sums of `Moments` over positions, from what is seen `[n, f]` and what is missing `[n, c]` at each."""
  y, z = seen.astype(jnp.float32), missing.astype(jnp.float32)
  y = jnp.concatenate([y, jnp.ones_like(y[:, :1])], axis=1)
  return jnp.matmul(y.T, y, precision="highest"), jnp.matmul(y.T, z, precision="highest")


def _feature_axes(eqn: JaxprEqn, i: int) -> tuple[int, ...]:
  """Returns the axes of operand i that an equation sums over, ascending; none if it is no plain product."""
  params = eqn.params
  if eqn.primitive.name == "conv_general_dilated" and i == 1:
    is_plain = params["feature_group_count"] == params["batch_group_count"] == 1
    return tuple(sorted(params["dimension_numbers"].rhs_spec[1:])) if is_plain else ()
  if eqn.primitive.name == "dot_general":
    contracted, batched = params["dimension_numbers"]
    return () if batched[i] else tuple(sorted(contracted[i]))
  return ()


def _sums_over_windows(
  eqn: JaxprEqn, x: jax.Array, missing: jax.Array, kernel: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
  """Returns the sums of `Moments` of a convolution whose kernel has such a shape; x are the kept channels, last.

  Laid out, windows are as many times larger than images as a window has places, so that is done to some images at once.
  """
  places, spatial = missing.shape[1:-1], eqn.params["dimension_numbers"].rhs_spec[2:]
  features = math.prod(kernel[axis] for axis in spatial) * x.shape[-1]
  most = max(1, _AT_ONCE // (math.prod(places) * features))
  at_once = next(n for n in range(min(most, len(x)), 0, -1) if len(x) % n == 0)

  def add(total: Any, images: Any) -> tuple[Any, None]:
    some, their_missing = images
    seen = _windows(eqn, some, places, kernel)
    found = _sums(seen.reshape(-1, seen.shape[-1]), their_missing.reshape(-1, missing.shape[-1]))
    return jax.tree.map(jnp.add, total, found), None

  zero = (jnp.zeros((features + 1, features + 1)), jnp.zeros((features + 1, missing.shape[-1])))
  split = tuple(array.reshape(-1, at_once, *array.shape[1:]) for array in (x, missing))
  (seen, with_missing), _ = jax.lax.scan(add, zero, split)
  return seen, with_missing


def _windows(eqn: JaxprEqn, x: jax.Array, places: Sequence[int], kernel: Sequence[int]) -> jax.Array:
  """Returns what a convolution's kernel of such a shape sees at each of its places: `[batch, *places, f]`."""
  params, batched = eqn.params, [(0, 0, 0)]
  ends = [(low, high, by - 1) for (low, high), by in zip(params["padding"], params["lhs_dilation"], strict=True)]
  x = jax.lax.pad(x, jnp.zeros((), x.dtype), [*batched, *ends, *batched])
  numbers, strides = params["dimension_numbers"], params["window_strides"]
  spatial = numbers.rhs_spec[2:]
  window = [kernel[axis] for axis in spatial]
  seen = []
  for offset in itertools.product(*map(range, window)):
    start = [at * by for at, by in zip(offset, params["rhs_dilation"], strict=True)]
    stop = [first + by * (count - 1) + 1 for first, by, count in zip(start, strides, places, strict=True)]
    seen.append(jax.lax.slice(x, [0, *start, 0], [len(x), *stop, x.shape[-1]], [1, *strides, 1]))
  y = jnp.stack(seen, axis=-2).reshape(len(x), *places, *window, x.shape[-1])
  order = np.argsort([*spatial, numbers.rhs_spec[1]]) + 1 + len(places)
  return y.transpose(*range(1 + len(places)), *order).reshape(len(x), *places, -1)


def _channels_last(x: jax.Array, spec: Sequence[int]) -> jax.Array:
  """Returns the operand or result of a convolution as `[batch, ..., channels]`."""
  return x.transpose(spec[0], *spec[2:], spec[1])


def _is_floating(array: Any) -> bool:
  return jnp.issubdtype(array.dtype, jnp.floating)
