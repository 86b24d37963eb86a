"""Forms of Flax layers that are fast on CPUs, where XLA leaves much undone; on accelerators they gain nothing.

The module and its variables stay as they are: layers are replaced while a function is traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from sapr_jax.checks import check_function


def with_fast_layers(function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a function that runs Flax layers in faster forms: the same values and gradients up to rounding.

  Batch normalization in training, and depthwise convolutions; float32 only, others stay as they are. The result is a
  function to give to `jax.jit`. Gradients are taken backward only: `jax.jvp` cannot go through such a batch
  normalization. A depthwise convolution is one call of a layer within another, and `capture_intermediates` sees both.
  """

  check_function("function", function, "such as a training step; the result is to be given to jax.jit")

  @functools.wraps(function)
  def fast(*args: Any, **kwargs: Any) -> Any:
    with nn.intercept_methods(_replace):
      return function(*args, **kwargs)

  return fast


def has_fast_layers(function: Callable[..., Any], *args: Any) -> bool:
  """Says whether `with_fast_layers` replaces any layer that `function(*args)` runs; arrays may be their shapes."""
  found = []

  def note(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    found.append(_fast_form(args, kwargs, context) is not None)
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(note):
    jax.eval_shape(function, *args)
  return any(found)


def _replace(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
  """Runs a layer in its fast form, if it has one."""
  form = _fast_form(args, kwargs, context)
  return next_fun(*args, **kwargs) if form is None else form()


def _fast_form(args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Callable[[], Any] | None:
  """Returns what runs a layer in its fast form; None if it has none, or its fields ask for something unusual."""
  layer = context.module
  if context.method_name == "__call__" and len(args) == 1 and not layer.is_initializing():
    if type(layer) is nn.BatchNorm and _is_plain_batch_norm(layer, args[0], kwargs):
      return lambda: _run_batch_norm(layer, args[0])
    if _is_grouped_convolution(layer):
      return lambda: layer.clone(parent=layer.scope, conv_general_dilated=convolve)(*args, **kwargs)
  return None


def _is_grouped_convolution(layer: nn.Module) -> bool:
  if type(layer) is not nn.Conv or layer.feature_group_count == 1:
    return False
  return layer.conv_general_dilated is None and layer.conv_general_dilated_cls is None


_BATCH_NORM_VARIABLES = (("params", "scale"), ("params", "bias"), ("batch_stats", "mean"), ("batch_stats", "var"))


def _is_plain_batch_norm(layer: nn.BatchNorm, x: Any, kwargs: dict[str, Any]) -> bool:
  """Returns whether it normalizes float32 with the statistics of this batch, along the last axis, and nothing else."""
  running = kwargs.get("use_running_average", layer.use_running_average)
  return (
    running is False
    and set(kwargs) <= {"use_running_average"}
    and layer.use_running_average in (None, running)
    and layer.axis in (-1, x.ndim - 1)
    and layer.axis_name is None
    and layer.use_scale
    and layer.use_bias
    and layer.use_fast_variance
    and x.dtype == jnp.float32
    and layer.dtype in (None, jnp.float32)
    and layer.param_dtype == jnp.float32
    and layer.is_mutable_collection("batch_stats")
    # Not yet there, or in a box of Flax's, or of another type: the layer itself knows what to do.
    and all(isinstance(v, jax.Array) and (v.shape, v.dtype) == (x.shape[-1:], jnp.float32) for v in _stored(layer))
  )


def _stored(layer: nn.BatchNorm) -> list[Any]:
  """Returns the layer's variables in the order of `_BATCH_NORM_VARIABLES`; None for one that is not there."""
  return [layer.get_variable(*place) for place in _BATCH_NORM_VARIABLES]


def _run_batch_norm(layer: nn.BatchNorm, x: jax.Array) -> jax.Array:
  scale, bias, *old = _stored(layer)
  y, *new = batch_norm(x, scale, bias, layer.epsilon)
  for place, before, now in zip(_BATCH_NORM_VARIABLES[2:], old, new, strict=True):
    layer.put_variable(*place, layer.momentum * before + (1 - layer.momentum) * now)
  return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def batch_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> tuple[jax.Array, ...]:
  """Normalizes with the statistics of the batch; its gradient reads the batch twice only.

  Args:
    x: `[..., channels]`.
    scale: `[channels]`.
    bias: `[channels]`.
    epsilon: Added to the variance.

  Returns:
    (y, mean, variance); the variance is E[x^2] - E[x]^2, as in `flax.linen.BatchNorm`.
  """
  return _batch_norm_forward(x, scale, bias, epsilon)[0]


_traced_once = functools.partial(jax.jit, inline=True)  # for all layers of one shape; the program is the same


@functools.partial(_traced_once, static_argnums=3)
def _batch_norm_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> tuple[Any, Any]:
  axes = tuple(range(x.ndim - 1))
  mean = jnp.mean(x, axes)
  var = jnp.maximum(0.0, jnp.mean(x * x, axes) - mean * mean)
  inverse = lax.rsqrt(var + epsilon)
  return ((x - mean) * (inverse * scale) + bias, mean, var), (x, mean, inverse, scale)


@functools.partial(_traced_once, static_argnums=0)
def _batch_norm_backward(epsilon: float, residuals: Any, gradients: Any) -> tuple[jax.Array, ...]:
  del epsilon
  x, mean, inverse, scale = residuals
  dy, dmean, dvar = gradients
  axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
  dbias = jnp.sum(dy, axes)
  dscale = jnp.sum(dy * (x - mean), axes) * inverse
  slope = scale * inverse
  constant = (dmean - slope * dbias) / count
  linear = (2 * dvar - slope * inverse * dscale) / count
  return slope * dy + (constant + (x - mean) * linear), dscale, dbias


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def convolve(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **options: Any) -> jax.Array:
  """Does what `jax.lax.conv_general_dilated` does; a depthwise one as a sum of shifted products.

  XLA's own takes some forty times as long as the sum, which is one pass over the image.
  """
  channels = x.shape[-1]
  plain = all(set(options.get(name) or (1,)) == {1} for name in ("lhs_dilation", "rhs_dilation"))
  depthwise = options.get("feature_group_count") == channels == kernel.shape[-1] and kernel.shape[-2] == 1
  common = x.ndim == 4 and x.dtype == jnp.float32 and options.get("preferred_element_type") is None
  pads = padding
  if common and isinstance(padding, str):
    pads = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
  if not (plain and depthwise and common and _leaves_a_window(x.shape[1:3], kernel.shape[:2], pads)):
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  (height, width), (down, right) = kernel.shape[:2], strides
  rows, columns = (x.shape[1] - height) // down + 1, (x.shape[2] - width) // right + 1

  def shifted(i: int, j: int) -> jax.Array:
    stop = (x.shape[0], i + (rows - 1) * down + 1, j + (columns - 1) * right + 1, channels)
    return lax.slice(x, (0, i, j, 0), stop, (1, down, right, 1))

  return sum(
    (shifted(i, j) * kernel[i, j, 0] for i in range(height) for j in range(width)), start=jnp.zeros((), x.dtype)
  )


def _leaves_a_window(size: Sequence[int], window: Sequence[int], padding: Any) -> bool:
  """Returns whether the window fits into the padded image, and nothing is cropped off."""
  return all(
    min(low, high) >= 0 and n + low + high >= k for n, k, (low, high) in zip(size, window, padding, strict=True)
  )
