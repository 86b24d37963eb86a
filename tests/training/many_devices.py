"""The steps on meshes of some devices: `python many_devices.py FILE 1 2` writes the results for `test_devices.py`.

A program of its own, as the number of virtual devices is settled when JAX starts.
"""

import dataclasses
import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import sapr_jax as sapr
from sapr_jax.method import GeneratorState
from sapr_jax.runtime import devices
from sapr_jax.training import steps
from sapr_jax.training.inputs import Preprocessing, Shared
from sapr_jax.training.state import TrainState

PREPROCESSING = Preprocessing(mean=(0.5,), std=(0.25,))
SHAPE = (4, 4, 1)


class Plain(nn.Module):
  """Two convolutions, with or without batch normalization."""

  norm: bool

  @nn.compact
  def __call__(self, x, train=False):
    for number, features in enumerate((4, 6)):
      x = nn.Conv(features, (3, 3), name=f"conv{number}")(x)
      if self.norm:
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"bn{number}")(x)
      x = nn.relu(x)
    return nn.Dense(10, name="fc")(x.mean((1, 2)))


def main(file: str, counts: list[int]) -> None:
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (21, *SHAPE)).astype(np.uint8)
  shared = Shared(images=images, labels=rng.integers(0, 10, 21).astype(np.int32), key=jax.random.key(0))
  distinct = np.arange(16)[None]
  # Each device gets the same two images over and over: its batch statistics are those of the whole batch.
  tiled = np.tile([3, 7], 8)[None]
  results = {}
  for count in counts:
    mesh = Mesh(np.asarray(jax.devices()[:count]), (devices.AXIS,))
    for norm, batch in ((False, distinct), (True, tiled)):
      found = weights(mesh, Plain(norm), shared, [batch] * 3)
      results |= flat(f"{'norm' if norm else 'plain'}/{count}", found)
    results |= flat(f"generator/{count}", generator(mesh, shared, [distinct] * 2))
    results |= flat(f"evaluation/{count}", evaluation(mesh, shared))
  np.savez(file, **results)


def flat(prefix, tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf for path, leaf in leaves}


@functools.cache
def initial(model):
  # On the host: the copy on a device would go with the state that a step takes over.
  return jax.device_get(jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, *SHAPE))))


def run(mesh, step, carry, shared, calls):
  """Runs a step with implicit transfers forbidden; returns the last carry, metrics, number of programs."""
  mapped = devices.MappedStep(step, mesh)
  carry, shared = devices.replicate((carry, shared), mesh)
  with jax.transfer_guard("disallow"):
    carry, metrics = mapped.run(carry, shared, calls)
  for leaf in jax.tree.leaves(carry):
    copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
    assert len(copies) == mesh.devices.size
    for copy in copies:
      np.testing.assert_array_equal(copy, copies[0])
  return {"carry": jax.device_get(carry), "metrics": metrics, "programs": mapped._many._cache_size()}


def weights(mesh, model, shared, calls):
  tx = optax.sgd(0.1, 0.9)
  step = steps.weight_step(model, tx, PREPROCESSING)
  return run(mesh, step, TrainState.create(initial(model), tx), shared, calls)


def generator(mesh, shared, calls):
  model = Plain(norm=True)
  variables = initial(model)
  graph = sapr.trace_channels(model, variables, (1, *SHAPE), select="unjoined")
  architecture, tx = sapr.ArchitectureGenerator.for_graph(graph), optax.adamw(1e-2)
  options = sapr.SearchOptions(sapr.macs_budget(graph, 0.5), bias=0.0)
  step = steps.generator_step(model, architecture, graph, tx, PREPROCESSING, options)
  state = GeneratorState.create(architecture.init(jax.random.key(2)), tx)
  found = run(mesh, step, state, dataclasses.replace(shared, variables=variables), calls)

  def sample(carry, shared, batch):
    key, _ = jax.random.split(jax.random.fold_in(shared.key, carry))
    return carry + 1, {"masks": sapr.sample_masks(key, jnp.zeros((2, 6)), bias=0.0)}

  mapped = devices.MappedStep(sample, mesh)
  _, metrics = mapped(*devices.replicate((jnp.int32(5), shared), mesh), mapped.place(calls[0]))
  found["masks"] = np.stack([np.asarray(shard.data) for shard in metrics["masks"].addressable_shards])
  return found


def evaluation(mesh, shared):
  model, found = Plain(norm=True), {}
  shared = dataclasses.replace(shared, variables=initial(model))
  for size in (8, 16):
    padded = np.resize(np.arange(21), (-(-21 // size) * size,)).reshape(-1, 1, size)
    weights = (np.arange(padded.size) < 21).astype(np.float32).reshape(padded.shape)
    zero = {name: np.zeros((), np.float32) for name in ("correct", "loss", "count")}
    step = steps.evaluation_step(model, PREPROCESSING)
    found[str(size)] = run(mesh, step, zero, shared, list(zip(padded, weights, strict=True)))["carry"]
  return found


if __name__ == "__main__":
  main(sys.argv[1], [int(count) for count in sys.argv[2:]])
