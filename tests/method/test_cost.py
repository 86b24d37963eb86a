"""Costs: exact on integers, differentiable otherwise, equal to what the pruned network has."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapr_jax as sapr
from sapr_jax.method import COSTS, cost_of, make_budget, measured_costs


def test_costs_by_hand(bottleneck):
  # As in test_budget: r, m and e channels on 4x4 images, two input channels, five outputs.
  r, m, e = kept = np.array([3, 2, 1], np.int64)
  want = {
    "prunable_macs": 16 * (2 * r + 9 * r * m + m * e) + 16 * e * 5,
    "macs": 16 * (2 * r + 9 * r * m + m * e) + 16 * e * 5,
    "params": (2 * r + r) + (9 * r * m + m) + (m * e + e) + (16 * e * 5 + 5),
  }
  for name in want:
    cost = cost_of(name, bottleneck.graph)
    assert cost.name == name
    assert cost(kept) == want[name] and isinstance(cost(kept), int)


def test_parameters_are_those_of_the_pruned_tree(tiny):
  cost = COSTS["params"](tiny.graph)
  masks = {name: np.arange(mask.size) % 3 > 0 for name, mask in tiny.graph.full_masks().items()}
  pruned = sapr.prune_tree(tiny.params, tiny.graph, masks)
  assert cost(tiny.graph.kept(masks)) == sum(leaf.size for leaf in jax.tree.leaves(pruned))


@pytest.mark.parametrize("name", sorted(COSTS.keys() - measured_costs()))
def test_a_cost_is_differentiable_and_rises_with_every_width(tiny, name):
  cost = COSTS[name](tiny.graph)
  kept = tiny.graph.kept()
  value, slope = jax.jit(jax.value_and_grad(cost))(jnp.asarray(kept, jnp.float32))
  np.testing.assert_allclose(value, cost(kept), rtol=1e-6)
  one_less = [cost(kept) - cost(kept - step) for step in np.eye(len(kept), dtype=np.int64)]
  np.testing.assert_allclose(slope, one_less, rtol=1e-5)  # no group meets another in one layer
  assert (np.array(one_less) > 0).all()


def test_one_entry_makes_a_measured_cost(tiny, monkeypatch):
  def energy(graph, table):
    return dataclasses.replace(COSTS["macs"](graph), name=f"energy_{table}")

  monkeypatch.setitem(COSTS, "energy", energy)
  assert measured_costs() == ["latency", "energy"]
  assert cost_of("energy", tiny.graph, lambda: "mj").name == "energy_mj"
  with pytest.raises(sapr.InputError, match=r"with its measurements, got 'energy' alone; write energy\(graph, table\)"):
    make_budget(tiny.graph, "energy", share=0.5)
  with pytest.raises(sapr.InputError, match=r"cost must be one of 'prunable_macs', .*'energy', got 'flops'"):
    cost_of("flops", tiny.graph)
  with pytest.raises(sapr.InputError, match="cost must be one of prunable_macs, macs, params, latency, energy, or a"):
    make_budget(tiny.graph, "flops", share=0.5)
