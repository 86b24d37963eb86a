"""A pruner on one and on two devices: `python pruner_on_devices.py FILE` writes the results for `test_pruner.py`.

A program of its own, as the number of virtual devices is settled when JAX starts.
"""

import sys

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_pruner import BATCHES, LEARNING, VARIABLES, first_state, loss_fn, make, train_step

import sapr_jax as sapr


def main(file: str) -> None:
  results = {}
  for count in (1, 2):
    mesh = Mesh(np.asarray(jax.devices()[:count]), ("data",))
    everywhere, cut = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    pruner = make(sapr.Search(generator=LEARNING))
    state = jax.device_put(first_state(pruner.regularize(optax.sgd(0.1))), everywhere)
    batches = [jax.device_put(batch, cut) for batch in BATCHES]
    programs = train_step._cache_size()
    for _ in range(3):
      state = pruner.update(state, state.variables, batches, loss_fn)
      for batch in batches:
        state = train_step(state, batch)
    assert train_step._cache_size() == programs + 1
    for leaf in jax.tree.leaves(state.opt_state):
      assert leaf.sharding.is_equivalent_to(everywhere, leaf.ndim), leaf.sharding
    for name in ("a", "b"):
      results[f"masks/{count}/{name}"] = np.asarray(pruner.masks(state)[name])
      results[f"params/{count}/{name}"] = np.asarray(state.params[name]["kernel"])
    small_model, small_variables = pruner.prune(state.variables, state)
    assert np.isfinite(small_model.apply(small_variables, BATCHES[0]["x"])).all()
  assert VARIABLES["params"]["a"]["kernel"].shape == (5, 8)
  np.savez(file, **results)


if __name__ == "__main__":
  main(sys.argv[1])
