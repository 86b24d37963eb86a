"""Pruning in somebody's own training loop: a transform around the optimizer, a call before each epoch, and the cut.

All that changes is one pytree in the optimizer state, so that whatever saves and places that state does it for the
pruning too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sapr_jax.channels import ChannelGraph, check_variables, is_array, is_nnx, network_of, prune, trace_channels
from sapr_jax.channels.graph import Selection
from sapr_jax.channels.selection import Patterns
from sapr_jax.checks import check_integer, check_number, check_type, shown
from sapr_jax.errors import InputError
from sapr_jax.method.budget import Budget, amount_in_words, check_budget, macs_budget, project_to_budget
from sapr_jax.method.masks_in_state import (
  RegularizationState,
  array_in,
  find_states,
  get_masks,
  placed_like,
  replace_states,
  set_masks,
  warn_if,
)
from sapr_jax.method.proposer import LossFn, Proposer
from sapr_jax.method.proposing import Search
from sapr_jax.method.regularization import Weighting, relative_weights
from sapr_jax.method.rounding import default_round_to
from sapr_jax.method.statistics import renew_statistics
from sapr_jax.method.transforms import regularize_by_penalty, regularize_by_prox

Tree = TypeVar("Tree")

_CURE = "make it by tx = pruner.regularize(optimizer) and tx.init(params)"


class PrunerState(NamedTuple):
  """State of `Pruner.regularize`.

  Attributes:
    epoch: Number of calls of `Pruner.update`, int32 scalar.
    key: Randomness of the search, uint32 `[2]`.
    generator: Arrays of a `GeneratorState` by their path; {} without a generator. The paths are single names, so that
      none is taken for a parameter of the network where the state is cut by `prune_tree`.
    regularization: The masks in force.
    optimizer: State of the optimizer that was given to `Pruner.regularize`.
  """

  epoch: jax.Array
  key: jax.Array
  generator: dict[str, jax.Array]
  regularization: RegularizationState
  optimizer: Any


class Pruner:
  """Prunes a network while somebody's own loop trains it.

  An object of this class is a description and never changes. What changes lies in the optimizer state, in which
  `regularize` has put it; every method that takes `opt_state` finds it there, however deep other transforms of optax
  have nested it, and takes a whole `TrainState` of Flax too.

  A network of Flax NNX is one object, which takes the place of the model and its variables in every method, and an
  `nnx.Optimizer` is changed in place:

      pruner = sapr.Pruner(module, inputs, budget=0.5, gamma=0.1)
      optimizer = nnx.Optimizer(module, pruner.regularize(optax.sgd(0.1)), wrt=nnx.Param)
      pruner.update(optimizer, module)  # before every epoch
      small_module = pruner.prune(module, optimizer)

  Attributes:
    model: The dense network.
    graph: Its channel graph.
    budget: The most that the pruned network may cost.
    gamma: Strength of the partial regularization.
    search: Who chooses the channels, and when.
    round_to: A number that widths are multiples of.

  Example:
    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import sapr_jax as sapr
    >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(1)]), jnp.ones((4, 3))
    >>> variables = model.init(jax.random.key(0), x)
    >>> pruner = sapr.Pruner(model, variables, x, budget=0.5, gamma=0.1, select="unjoined")
    >>> tx = pruner.regularize(optax.sgd(0.1))
    >>> opt_state = tx.init(variables["params"])
    >>> for epoch in range(2):
    ...   opt_state = pruner.update(opt_state, variables)
    ...   grads = jax.grad(lambda params: jnp.mean(model.apply({"params": params}, x) ** 2))(variables["params"])
    ...   updates, opt_state = tx.update(grads, opt_state, variables["params"])
    ...   variables = {"params": optax.apply_updates(variables["params"], updates)}
    >>> small_model, small_variables = pruner.prune(variables, opt_state)
    >>> small_variables["params"]["layers_0"]["kernel"].shape
    (3, 4)
  """

  def __init__(
    self,
    model: Any,
    variables: Any = None,
    inputs: Any = None,
    *,
    budget: float | Budget | Callable[[ChannelGraph], Budget],
    gamma: float,
    search: Search | None = None,
    select: Selection = "blocks",
    include: Patterns = (),
    exclude: Patterns = (),
    apply_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
  ):
    """Traces the channels of a network, and checks that the budget can be met.

    Args:
      model: A module of Flax linen, or of Flax NNX.
      variables: Its variables, or their shapes; left out for a module of NNX, `Pruner(module, inputs, ...)`.
      inputs: What the model is applied to: an array, or its shape; the size of the batch does not matter. Or a tuple of
        several arrays, or trees of them; costs are those of such a call.
      budget: Share of the MACs to keep, in (0, 1], in the layers that can be cut; or a function of the channel graph,
        such as `lambda graph: sapr.macs_budget(graph, amount=30e6, of="network")`.
      gamma: Strength of the regularization. `gamma_for(4, learning_rate, steps)` finds one that suits a schedule.
      search: Who chooses the channels, and when; by default `Search()`.
      select: Which channel groups are offered, see `trace_channels`; "unjoined" for a flat network.
      include: Globs of names of groups or modules, such as "encoder/*": the only ones of these that are offered.
      exclude: Globs of those that are not.
      apply_kwargs: Arguments of `model.apply` that choose the evaluation mode, such as `{"train": False}`. With NNX a
        copy of the module is traced, after `eval()`.
      seed: Seed of the generator and of random importances.

    Raises:
      InputError: If an argument cannot be used; see `trace_channels` and `check_budget`.
    """
    check_number("gamma", gamma, "at least 0", lambda x: x >= 0)
    check_integer("seed", seed, 0)
    self.search = Search() if search is None else search
    check_type("search", self.search, Search, "Search(start=5, importance='l2_norm') makes one")
    self.model, self.gamma = model, gamma
    _, _, (inputs, *_) = network_of(model, variables, (inputs,))
    args, traced = inputs if isinstance(inputs, tuple) and any(map(is_array, inputs)) else (inputs,), {}
    if len(args) == 1 and is_array(args[0]) and args[0].ndim > 1:  # the cost of one example, whatever the batch
      args, traced = (args[0].shape,), {"input_dtype": args[0].dtype}
    traced |= {"select": select, "include": include, "exclude": exclude, "apply_kwargs": apply_kwargs}
    self.graph = trace_channels(model, None if is_nnx(model) else variables, *args, **traced)
    self.budget = self._budget(budget)
    min_width, round_to = self.search.min_width, self.search.round_to
    if round_to is None:
      round_to = default_round_to(self.graph, self.budget, jax.default_backend(), min_width=min_width)
    self.round_to = round_to
    check_budget(self.graph, self.budget, min_width=min_width, round_to=round_to)
    self._key = np.asarray(jax.random.key_data(jax.random.key(seed)))
    self._proposer = Proposer(self.graph, self.budget, self.search)

  def _budget(self, budget: Any) -> Budget:
    if isinstance(budget, Budget):
      return budget
    if not callable(budget):
      return macs_budget(self.graph, budget)
    made = budget(self.graph)
    check_type("What budget returns", made, Budget, "sapr_jax.macs_budget(graph, 0.5) makes one")
    return made

  # In the loop -------------------------------------------------------------------------------------------------------

  def regularize(
    self,
    optimizer: optax.GradientTransformation,
    *,
    form: Literal["penalty", "proximal"] = "penalty",
    learning_rate: float | Callable[[Any], Any] | None = None,
    momentum: float = 0.0,
    weighting: Weighting = relative_weights,
  ) -> optax.GradientTransformationExtraArgs:
    """Adds the partial regularization, and the state of the pruning, to an optimizer.

    Args:
      optimizer: Any transform of optax.
      form: "penalty" adds the gradient of the group lasso before the optimizer, see `regularize_by_penalty`; "proximal"
        shrinks weights after it, see `regularize_by_prox`, and suits optimizers that rescale gradients, as Adam does.
      learning_rate: That of the optimizer, a number or a schedule of the step; for "proximal" alone.
      momentum: That of SGD; for "proximal" alone.
      weighting: Weights of the groups, see `partial_group_lasso`.

    Returns:
      A transform for `tx.init(params)` and `tx.update(grads, opt_state, params)`, for any `TrainState`, or for an
      `nnx.Optimizer`. It logs a warning in its first step if `update` was not called before.

    Raises:
      InputError: If an argument cannot be used.
    """
    check_type("optimizer", optimizer, optax.GradientTransformation, "optax.sgd(0.1) is one")
    if not isinstance(form, str) or form not in ("penalty", "proximal"):
      raise InputError(f"form must be 'penalty' or 'proximal', got {shown(form)}.")
    options: Any = {"weighting": weighting, "expected_from": None}
    if form == "penalty":
      regularization = regularize_by_penalty(self.graph, self.gamma, **options)
    elif learning_rate is None:
      raise InputError("learning_rate must be that of the optimizer where form='proximal', got None.")
    else:
      regularization = regularize_by_prox(self.graph, learning_rate, self.gamma, momentum=momentum, **options)
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> PrunerState:
      key = jnp.asarray(self._key)
      first = self._proposer.first(key)
      return PrunerState(jnp.zeros((), jnp.int32), key, first, regularization.init(params), inner.init(params))

    def update(updates: Any, state: PrunerState, params: Any = None, **extra: Any) -> tuple[Any, PrunerState]:
      check_type("state", state, PrunerState, "tx.init(params) makes it")
      warn_if(
        jnp.logical_and(jnp.asarray(state.regularization.step) == 0, jnp.asarray(state.epoch) == 0),
        "the first step of training came before pruner.update: call opt_state = pruner.update(opt_state, variables,"
        " batches, loss_fn) before every epoch, or nothing is ever pruned.",
      )
      steps = [("regularization", regularization), ("optimizer", inner)]
      for name, transform in steps if form == "penalty" else reversed(steps):
        updates, part = transform.update(updates, getattr(state, name), params, **extra)
        state = state._replace(**{name: part})
      return updates, state

    return optax.GradientTransformationExtraArgs(init, update)

  def update(
    self,
    opt_state: Tree,
    variables: Any,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
  ) -> Tree:
    """Counts an epoch that begins; searches if it is time, and puts new masks into the optimizer state.

    Call it before every epoch, outside of `jax.jit`. It is deterministic, and goes on from a saved state bit for bit.

    Args:
      opt_state: The optimizer state; an `nnx.Optimizer` is changed in place.
      variables: Variables of the network, all collections, or the module of NNX; they stay as they are.
      batches: Pytrees of arrays, of one shape, that the generator learns on, or "taylor" reads: a tenth of the training
        images is enough. Arrays may be cut over several devices. Not read by other importances.
      loss_fn: (variables, batch) -> mean loss over the batch, a scalar; the network best in evaluation mode. It is
        compiled once: pass the same function every time. With NNX it gets a copy of the module, after `eval()`:
        (module, batch) -> loss.

    Returns:
      The new optimizer state; shapes, dtypes and placement stay, so that a compiled step is not compiled again.

    Raises:
      InputError: If there is no state of a pruner in `opt_state`, an argument is missing, or scores hold a NaN.
    """
    if is_nnx(variables):
      from sapr_jax.channels import nnx  # takes a while to import

      loss_fn = nnx.OfVariables(variables, loss_fn) if callable(loss_fn) else loss_fn
      variables = nnx.variables_of(variables)
    check_variables(variables)
    state, epoch = self._state(opt_state), self._epoch(opt_state)
    changed = state._replace(epoch=placed_like(state.epoch, epoch + 1))
    if self.search.is_on(epoch):
      learned = {name: array_in(box) for name, box in state.generator.items()}
      learned, scores = self._proposer.propose(learned, array_in(state.key), variables, batches, loss_fn)
      changed = changed._replace(generator={n: placed_like(old, learned[n]) for n, old in state.generator.items()})
      if self.search.is_in_force(epoch):
        widths = {"min_width": self.search.min_width, "round_to": self.round_to}
        changed = set_masks(changed, project_to_budget(self.graph, scores, self.budget, **widths))
    return replace_states(opt_state, PrunerState, lambda _: changed, _CURE)

  def masks(self, opt_state: Any) -> dict[str, Any]:
    """Returns the masks in force: group name -> 0/1 array `[group.size]`; 1 keeps the channel."""
    return get_masks(self._state(opt_state))

  def prune(
    self,
    variables: Any,
    opt_state: Any,
    batches: Iterable[Any] | None = None,
    renew: Callable[..., Any] | None = None,
  ) -> Any:
    """Cuts the channels that the masks drop.

    Args:
      variables: Variables of the dense network, all collections, or the module of NNX.
      opt_state: The optimizer state.
      batches: Pytrees of arrays on which running statistics are measured again; None keeps those of the dense network.
      renew: (model, variables, batch) -> the new statistics, or with NNX (module, batch) -> None, see
        `renew_statistics`.

    Returns:
      (the small model, its variables), to be fine-tuned like any other; with NNX the small module.

    Raises:
      InputError: If the masks do not meet the budget, as `update` was never called or not until the search; or if only
        one of `batches` and `renew` is given.
    """
    if (batches is None) != (renew is None):
      raise InputError("batches and renew must be given together: renew says how a batch changes the statistics.")
    masks = jax.device_get(self.masks(opt_state))
    cost = self.budget.cost(self.graph.kept(masks))
    if cost > self.budget.limit:
      epochs, first = self._epoch(opt_state), self.search.first_in_force
      raise InputError(
        f"the masks must cost at most {amount_in_words(self.budget.limit)} {self.budget.cost.name}, got"
        f" {amount_in_words(cost)}: pruner.update was called {epochs} times, and masks come into force in call"
        f" {first + 1}; call it before every epoch."
      )
    if is_nnx(variables):
      module: Any = prune(variables, self.graph, masks)
      return module if batches is None else renew_statistics(module, batches, renew)
    model, small = prune(self.model, variables, self.graph, masks)
    return model, small if batches is None else renew_statistics(model, small, batches, renew)

  def report(self, opt_state: Any) -> str:
    """Returns what the masks in force leave, in a few lines to be printed: costs, and widths of the channel groups."""
    masks = jax.device_get(self.masks(opt_state))
    cost, kept = self.budget.cost(self.graph.kept(masks)), self.graph.macs(masks)
    widths = ", ".join(f"{group.name} {int(masks[group.name].sum())}/{group.size}" for group in self.graph.groups)
    return (
      f"{kept:,} of {self.graph.macs():,} MACs ({kept / self.graph.macs():.1%}),"
      f" {cost / self.budget.full:.1%} of {self.budget.cost.name} (budget {self.budget.share:.1%}),"
      f" after {self._epoch(opt_state)} epochs\n{widths}"
    )

  def _state(self, opt_state: Any) -> PrunerState:
    """Returns the one state of a pruner in a tree."""
    found = find_states(opt_state, PrunerState, _CURE)
    if len(found) > 1:
      raise InputError(f"opt_state must hold one PrunerState, got {len(found)}; use one pruner.regularize in it.")
    return found[0]

  def _epoch(self, opt_state: Any) -> int:
    return int(array_in(self._state(opt_state).epoch))
