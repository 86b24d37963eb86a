"""The law that every test of this folder rests on: the masked dense network is the pruned network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from sapr_jax.channels import ChannelGraph, count_macs, mask_params, masked_apply, prune, trace_channels

SHAPE = (1, 8, 8, 3)


def abstract_variables(model: nn.Module, shape: tuple[int, ...] = SHAPE, dtype: Any = np.float32) -> dict[str, Any]:
  with jax.numpy_dtype_promotion("standard"):  # flax draws float32 parameters for float64 images too
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, dtype))


def random_variables(model: nn.Module, seed: int, dtype: Any = np.float64, shape: tuple[int, ...] = SHAPE) -> Any:
  """Draws all variables: kernels, statistics, biases, and scales of which some are negative and some are zero."""
  rng = np.random.default_rng(seed)
  flat = {}
  for key, leaf in traverse_util.flatten_dict(abstract_variables(model, shape, dtype)).items():
    if key[-1] in ("var", "sigma"):
      value = rng.uniform(0.5, 2.0, leaf.shape)
    elif key[-1] == "mean":
      value = rng.normal(size=leaf.shape) / 2
    elif len(leaf.shape) > 1:
      value = rng.normal(size=leaf.shape) * (leaf.size / leaf.shape[-1]) ** -0.5
    else:
      value = rng.normal(size=leaf.shape) * (rng.uniform(size=leaf.shape) > 0.1)
    flat[key] = jnp.asarray(value, dtype)
  return traverse_util.unflatten_dict(flat)


def drawn(module: nnx.Module, seed: int = 0, dtype: Any = np.float64) -> Any:
  """Returns a module of NNX, which may be abstract, with random variables; statistics and scales are positive."""
  rng = np.random.default_rng(seed)

  def draw(place: Any, leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.key(0) if leaf.shape == () else jax.random.split(jax.random.key(0), leaf.shape)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return jnp.zeros(leaf.shape, leaf.dtype)
    value = rng.normal(size=leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5
    is_scale = any(name in jax.tree_util.keystr(place) for name in ("var", "scale", "sigma"))
    return jnp.asarray(np.abs(value) + 0.5 if is_scale else value, dtype)

  graphdef, state = nnx.split(module)
  return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))


def random_masks(graph: ChannelGraph, seed: int, single: bool = False) -> dict[str, np.ndarray]:
  """Draws masks; `single` keeps one channel of each group."""
  rng = np.random.default_rng(seed)
  masks = {}
  for group in graph.groups:
    mask = np.zeros(group.size) if single else (rng.uniform(size=group.size) < 0.6).astype(float)
    mask[rng.integers(group.size)] = 1
    masks[group.name] = mask
  return masks


def random_images(seed: int, dtype: Any = np.float64, shape: tuple[int, ...] = SHAPE) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).normal(size=(2, *shape[1:])), dtype)


def relative_error(got: Any, want: Any) -> float:
  """Returns the largest difference of two pytrees of arrays, relative to the largest entry of each array."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  errors = [0.0]
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.isfinite(b).all()
    errors.append(float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-6)))
  return max(errors)


def by_params(model: nn.Module, variables: Any, graph: ChannelGraph, masks: Any, *args: Any) -> Any:
  """Runs the masked network with masked parameters; `masked_apply` does the same another way."""
  return model.apply({**variables, "params": mask_params(variables["params"], graph, masks)}, *args)


def check_masked_is_pruned(
  model: nn.Module,
  graph: ChannelGraph,
  variables: Any,
  masks: Any,
  tolerance: float,
  dtype: Any = np.float64,
  run: Callable[..., Any] = by_params,
) -> None:
  """Checks masked = pruned, predicted = counted MACs, and that something was cut wherever a mask drops something.

  `run` runs the masked network: `by_params` or `masked_apply`.
  """
  images = random_images(11, dtype, graph.call.arrays[0].shape)
  want = jax.jit(lambda v, x: run(model, v, graph, masks, x))(variables, images)
  small, small_variables = prune(model, variables, graph, masks)
  assert all(np.ptp(leaf, axis=0).max() > 0 for leaf in jax.tree.leaves(want)), "the network ignores its input"
  got = jax.jit(small.apply)(small_variables, images)
  assert relative_error(got, want) < tolerance
  assert graph.macs(masks) == count_macs(small, small_variables, graph.call.arrays[0].shape, input_dtype=dtype)
  sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (variables, small_variables)]
  dropped = any(not np.all(mask) for mask in masks.values())
  assert (sizes[1] < sizes[0]) == dropped


def check_laws(model: nn.Module, select: Any, seeds: Any = (0, 1), tolerance: float = 1e-10) -> ChannelGraph:
  """Checks the law in float64: random masks for even seeds, single channels and gated inputs for odd ones."""
  with jax.enable_x64(True):
    variables = random_variables(model, 7)
    graph = trace_channels(model, variables, SHAPE, select=select, input_dtype=np.float64)
    for seed in seeds:
      masks = random_masks(graph, seed, single=seed % 2 == 1)
      check_masked_is_pruned(
        model, graph, variables, masks, tolerance, run=masked_apply if seed % 2 == 1 else by_params
      )
  return graph
