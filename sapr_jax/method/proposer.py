"""Scores of all channels as a `Search` says: by an importance of the weights, or by a generator that learns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sapr_jax.channels import ChannelGraph, Masks, mask_params
from sapr_jax.checks import check_function
from sapr_jax.errors import InputError
from sapr_jax.method.budget import Budget
from sapr_jax.method.generator import ArchitectureGenerator, split_by_group
from sapr_jax.method.importance import Scores, make_comparable, score_channels
from sapr_jax.method.prior import outputs_of_prior, reorder, start_from
from sapr_jax.method.proposing import Search
from sapr_jax.method.search import GeneratorState, SearchOptions, learn
from sapr_jax.method.statistics import some

LossFn = Callable[[Any, Any], jax.Array]
"""(variables of the dense network, batch) -> the loss, scalar."""


class Proposer:
  """Scores the channels of a network; never changes.

  The state of a generator is passed in and out as a dictionary, path of an array -> array; {} without a generator.
  """

  def __init__(self, graph: ChannelGraph, budget: Budget, search: Search):
    self.graph, self.budget, self.search = graph, budget, search
    if search.generator is not None:
      options = search.generator
      self._generator = ArchitectureGenerator.for_graph(graph)
      self._generator_tx = optax.adamw(options.learning_rate, weight_decay=options.weight_decay)
      self._options = SearchOptions(budget, options.budget_weight, options.bias, options.temperature)
      first = jax.eval_shape(self._first_generator, jax.random.key(0))
      self._structure = jax.tree.structure(first)
      places = jax.tree_util.tree_leaves_with_path(first)
      self._paths = [jax.tree_util.keystr(place, simple=True, separator="/") for place, _ in places]

  def first(self, key: jax.Array) -> dict[str, jax.Array]:
    """Returns the state of a generator that has learned nothing."""
    return {} if self.search.generator is None else self._flat(jax.jit(self._first_generator)(key))

  def propose(
    self,
    state: Mapping[str, jax.Array],
    key: jax.Array,
    variables: Mapping[str, Any],
    batches: Iterable[Any] | None,
    loss_fn: LossFn | None,
  ) -> tuple[dict[str, jax.Array], Scores]:
    """Returns the generator's new state, and the scores of all channels.

    Args:
      state: The generator's state.
      key: Randomness of the search, uint32 `[2]`.
      variables: Those of the dense network.
      batches: What a generator learns on, or "taylor" reads.
      loss_fn: The loss on them.

    Raises:
      InputError: If an argument that this search needs is None, or scores hold a NaN.
    """
    options = self.search.generator
    if options is None:
      return {}, self._importance(self.search.importance, key, variables, batches, loss_fn)
    batches, loss_fn = _needed(batches, loss_fn)
    generator = jax.tree.unflatten(self._structure, [state[path] for path in self._paths])
    if options.prior is not None and int(generator.step) == 0:
      generator = self._of_prior(generator, self._importance(options.prior, key, variables, None, None))
    for batch in some(batches):
      generator = self._learn(loss_fn, generator, key, dict(variables), batch)
    outputs: Any = jax.jit(self._generator.apply)(generator.variables)
    scores: Scores = split_by_group(jax.device_get(outputs), self.graph)
    if options.order is not None:
      scores = reorder(scores, self._importance(options.order, key, variables, None, None))
    return self._flat(generator), scores

  def _importance(
    self, name: str, key: jax.Array, variables: Mapping[str, Any], batches: Any, loss_fn: LossFn | None
  ) -> Scores:
    def gradients() -> Any:
      given, function = _needed(batches, loss_fn)
      total = None
      for batch in some(given):
        slope = self._slope(function, dict(variables), batch)
        total = slope if total is None else jax.tree.map(jnp.add, total, slope)
      return jax.device_get(total)

    params = jax.device_get(variables.get("params"))
    scores = score_channels(name, params, self.graph, gradients=gradients, key=lambda: jax.device_get(key))
    compare, exponent = self.search.compare, self.search.cost_exponent
    return make_comparable(
      jax.device_get(scores), self.graph, self.budget.cost, compare=compare, cost_exponent=exponent
    )

  def _of_prior(self, generator: GeneratorState, scores: Scores) -> GeneratorState:
    """Returns a generator that has learned nothing but knows these importances."""
    assert self.search.generator is not None
    strength, bias = self.search.generator.prior_strength, self._options.bias
    outputs = outputs_of_prior(self.graph, scores, self.budget, strength=strength, bias=bias)
    return GeneratorState.create(start_from(generator.variables, self.graph, outputs), self._generator_tx)

  def _first_generator(self, key: jax.Array) -> GeneratorState:
    return GeneratorState.create(self._generator.init(key), self._generator_tx)

  def _flat(self, generator: GeneratorState) -> dict[str, jax.Array]:
    return dict(zip(self._paths, jax.tree.leaves(generator), strict=True))

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def _learn(
    self, loss_fn: LossFn, state: GeneratorState, key: jax.Array, variables: Any, batch: Any
  ) -> GeneratorState:
    """Takes a step of the generator, with the weights fixed."""

    def network_loss(masks: Masks) -> jax.Array:
      return loss_fn({**variables, "params": mask_params(variables["params"], self.graph, masks)}, batch)

    key = jax.random.fold_in(key, state.step + 1)
    return learn(state, self._generator, self.graph, self._generator_tx, network_loss, key, self._options)[0]

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def _slope(self, loss_fn: LossFn, variables: Any, batch: Any) -> Any:
    return jax.grad(lambda params: loss_fn({**variables, "params": params}, batch))(variables["params"])


def _needed(batches: Iterable[Any] | None, loss_fn: LossFn | None) -> tuple[Iterable[Any], LossFn]:
  """Returns what a search that learns needs; raises `InputError` if it was not given."""
  if batches is None or loss_fn is None:
    missing = "batches" if batches is None else "loss_fn"
    raise InputError(f"{missing} must be given to this search: pruner.update(opt_state, variables, batches, loss_fn).")
  check_function("loss_fn", loss_fn, "it takes (variables, batch) and returns the loss")
  return batches, loss_fn
