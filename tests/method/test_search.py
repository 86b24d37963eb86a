"""The generator alone, on a trained network whose weights are fixed."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest

import sapr_jax as sapr
from sapr_jax.method import most_likely_masks


@pytest.fixture(scope="module")
def search(trained):
  """(budget) -> the generator's outputs after 200 steps."""
  generator = sapr.ArchitectureGenerator.for_graph(trained.graph)
  tx = optax.adamw(1e-2, weight_decay=1e-2)
  options = sapr.SearchOptions(sapr.macs_budget(trained.graph, 0.5))

  @jax.jit
  def step(variables, opt_state, key, limit):
    image_key, mask_key = jax.random.split(key)
    indices = jax.random.randint(image_key, (128,), 0, len(trained.labels))

    def loss_fn(masks):
      logits = sapr.masked_apply(trained.model, trained.variables, trained.graph, masks, trained.images[indices])
      return optax.softmax_cross_entropy_with_integer_labels(logits, trained.labels[indices]).mean()

    # A traced limit, so that one program searches for every budget.
    traced = dataclasses.replace(options, budget=dataclasses.replace(options.budget, limit=limit))

    def objective(params):
      candidate = {**variables, "params": params}
      return sapr.architecture_loss(generator, candidate, trained.graph, loss_fn, mask_key, traced)[0]

    grads = jax.grad(objective)(variables["params"])
    updates, opt_state = tx.update(grads, opt_state, variables["params"])
    return {**variables, "params": optax.apply_updates(variables["params"], updates)}, opt_state

  def run(budget):
    variables = generator.init(jax.random.key(1))
    opt_state = tx.init(variables["params"])
    for i in range(200):
      variables, opt_state = step(variables, opt_state, jax.random.key(i), budget.limit)
    return sapr.split_by_group(np.asarray(generator.apply(variables)), trained.graph)

  return run


@pytest.mark.parametrize(
  "p", [pytest.param(0.3, marks=pytest.mark.slow), 0.5, pytest.param(0.8, marks=pytest.mark.slow)]
)
def test_it_reaches_the_budget_and_beats_random_masks_of_the_same_macs(trained, search, p):
  graph, budget = trained.graph, sapr.macs_budget(trained.graph, p)

  def accuracy(scores):
    masks = sapr.project_to_budget(graph, scores, budget)
    assert p - 0.01 <= graph.prunable_macs(masks) / graph.prunable_macs() <= p
    return trained.accuracy(sapr.mask_params(trained.params, graph, masks))

  outputs = search(budget)
  # The penalty alone brings the masks near the budget; the projection closes the rest. Another seed, or another order
  # of summation, samples other masks: over six seeds the share was p - 0.06 to p + 0.01.
  share = graph.prunable_macs(most_likely_masks(outputs)) / graph.prunable_macs()
  assert p - 0.15 <= share <= p + 0.03
  rng = np.random.default_rng(0)
  at_random = [accuracy({g.name: rng.random(g.size) for g in graph.groups}) for _ in range(5)]
  assert accuracy(outputs) > np.mean(at_random) + 0.2  # 0.27 to 0.63 more over the six seeds
