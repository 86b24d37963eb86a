"""Objective of the search for the sub-network, and the step by which the generator minimizes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from sapr_jax.channels import ChannelGraph, Masks, check_graph, check_module, check_variables, errors_of_model
from sapr_jax.checks import check_function, check_number, check_type
from sapr_jax.method.budget import Budget, budget_penalty, check_is_budget
from sapr_jax.method.generator import ArchitectureGenerator, sample_masks, split_by_group


@dataclasses.dataclass(frozen=True)
class SearchOptions:
  """Constants of the search.

  Attributes:
    budget: What the sub-network may cost.
    budget_weight: lambda, the weight of `budget_penalty`.
    bias: b of Eq. 1.
    temperature: tau of Eq. 1.
  """

  budget: Budget
  budget_weight: float = 4.0
  bias: float = 3.0
  temperature: float = 0.4

  def __post_init__(self) -> None:
    check_is_budget(self.budget)
    for name, must, is_good in (
      ("budget_weight", "a number of at least 0", lambda x: x >= 0),
      ("bias", "a number", lambda x: True),
      ("temperature", "a number above 0", lambda x: x > 0),
    ):
      check_number(name, getattr(self, name), must, is_good, may_be_traced=True)


@flax.struct.dataclass
class SearchMetrics:
  """Parts of `architecture_loss`.

  Attributes:
    loss: The loss of the sampled sub-network, scalar.
    cost_share: Its cost, as a share of the dense network's; scalar.
  """

  loss: jax.Array
  cost_share: jax.Array


def architecture_loss(
  generator: ArchitectureGenerator,
  variables: Mapping[str, Any],
  graph: ChannelGraph,
  loss_fn: Callable[[Masks], jax.Array],
  key: jax.Array,
  options: SearchOptions,
) -> tuple[jax.Array, SearchMetrics]:
  """Draws a sub-network and computes how good and how cheap it is.

      loss_fn(v) + lambda log(max(T(v), limit) / limit),   v drawn by Eq. 1

  Differentiate it with respect to `variables["params"]`; the weights of the network stay as they are.

  Args:
    generator: The architecture generator.
    variables: Its variables.
    graph: The channel graph of the network.
    loss_fn: Masks -> the loss of the sub-network on a batch, scalar, without a change of anything; see `masked_apply`.
    key: Randomness of the draw.
    options: Budget and constants.

  Returns:
    (the objective, its parts).

  Example:
    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import sapr_jax as sapr
    >>> model, x = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(1)]), jnp.ones((8, 2))
    >>> variables = model.init(jax.random.key(0), x)
    >>> graph = sapr.trace_channels(model, variables, (1, 2), select="unjoined")
    >>> generator = sapr.ArchitectureGenerator.for_graph(graph)
    >>> agn = generator.init(jax.random.key(1))
    >>> loss_fn = lambda masks: jnp.mean(sapr.masked_apply(model, variables, graph, masks, x) ** 2)
    >>> options = sapr.SearchOptions(sapr.macs_budget(graph, 0.5))
    >>> loss, metrics = sapr.architecture_loss(generator, agn, graph, loss_fn, jax.random.key(2), options)
    >>> float(metrics.cost_share)
    1.0

  References:
    Gao et al., ICCV 2023, supplement A, Eq. 1; `budget_penalty` for the second term.
  """
  check_module(generator)
  check_variables(variables)
  check_graph(graph)
  check_function("loss_fn", loss_fn, "it takes masks and returns the loss")
  check_type("options", options, SearchOptions, "SearchOptions(macs_budget(graph, 0.5)) makes them")
  with errors_of_model("generator and variables"):
    outputs: Any = generator.apply(variables)
  masks = split_by_group(sample_masks(key, outputs, bias=options.bias, temperature=options.temperature), graph)
  loss = loss_fn(masks)
  budget = options.budget
  share = jnp.asarray(budget.cost(graph.kept(masks)) / budget.full)
  return loss + options.budget_weight * budget_penalty(graph, masks, budget), SearchMetrics(loss, share)


@flax.struct.dataclass
class GeneratorState:
  """State of the architecture generator.

  Attributes:
    step: Optimizer steps taken, int32 scalar.
    params: Parameters.
    constants: The fixed input z.
    opt_state: State of its optimizer.
    untrained: Its outputs before it learned anything, `[K, max C]`; () if nobody wants to know.
  """

  step: jax.Array
  params: Any
  constants: Any
  opt_state: optax.OptState
  untrained: Any = ()

  @classmethod
  def create(cls, variables: Any, tx: optax.GradientTransformation, untrained: Any = ()) -> GeneratorState:
    """Makes the state of a generator that has learned nothing."""
    return cls(
      step=jnp.zeros((), jnp.int32),
      params=variables["params"],
      constants=variables["constants"],
      opt_state=jax.jit(tx.init)(variables["params"]),  # one program in place of one for each shape
      untrained=untrained,
    )

  @property
  def variables(self) -> dict[str, Any]:
    """The variables for `generator.apply`."""
    return {"params": self.params, "constants": self.constants}


def learn(
  state: GeneratorState,
  generator: ArchitectureGenerator,
  graph: ChannelGraph,
  tx: optax.GradientTransformation,
  loss_fn: Callable[[Masks], jax.Array],
  key: jax.Array,
  options: SearchOptions,
  *,
  mean: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[GeneratorState, SearchMetrics]:
  """Takes a step of the generator on `architecture_loss`; `tx` is its optimizer, `mean` averages over devices."""

  def objective(params: Any) -> tuple[jax.Array, SearchMetrics]:
    return architecture_loss(generator, {**state.variables, "params": params}, graph, loss_fn, key, options)

  grads, metrics = jax.grad(objective, has_aux=True)(state.params)
  updates, opt_state = tx.update(mean(grads), state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), metrics
