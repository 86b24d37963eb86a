"""Variants of the method: choices that the supplement leaves open, as functions that a run is given.

The last factor of a row's name says which variant it runs. So a work directory, which is named by its
row, cannot be resumed with another one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sapr_jax.channels import ChannelGraph
from sapr_jax.method import (
  COMPARISONS,
  Cost,
  Scores,
  Weighting,
  rank_within_groups,
  relative_weights,
  share_weights,
  slopes,
  split_by_group,
)
from sapr_jax.training import Experiment, Proposer, make_proposer
from sapr_jax.training.passes import Purpose


def _tilted_ranks(scores: Scores, graph: ChannelGraph, cost: Cost, exponent: float) -> dict[str, jax.Array]:
  """Divides ranks by a power of what a channel costs: with large ones, expensive groups lose nearly all channels."""
  ranks = rank_within_groups(scores)
  of_groups = zip(graph.groups, slopes(graph, cost) ** exponent, strict=True)
  return {group.name: ranks[group.name] / price for group, price in of_groups}


@contextlib.contextmanager
def older_comparisons() -> Iterator[None]:
  """Lets `importance.compare` be "tilted_ranks" in the block, as in the rows with shares=tilted."""
  COMPARISONS["tilted_ranks"] = _tilted_ranks
  try:
    yield
  finally:
    del COMPARISONS["tilted_ranks"]


@dataclasses.dataclass(frozen=True)
class Variant:
  """The arguments of `training.run` that make a variant; the default is the paper's.

  Attributes:
    proposer: Makes what ranks the channels.
    weighting: Weights of the groups in the regularization.
  """

  proposer: Callable[[Experiment], Proposer] = make_proposer
  weighting: Weighting = relative_weights


def uniform_weights(dropped: jax.Array) -> jax.Array:
  """Gives each of the K groups the weight 1 / K, however many channels it drops."""
  return jnp.full(dropped.shape, 1.0 / len(dropped))


@dataclasses.dataclass(frozen=True)
class Sampled:
  """Ranks channels by o + g of Eq. 1 in place of o, with other noise g in each epoch.

  The masks of the last epoch are cut, so that these are the most likely ones.

  Attributes:
    inner: Gives o.
    graph: The channel graph.
    key: Randomness.
    last_epoch: The last epoch of training.
  """

  inner: Proposer
  graph: ChannelGraph
  key: jax.Array
  last_epoch: int

  def init(self) -> Any:
    return self.inner.init()

  def propose(self, state: Any, variables: Any, epoch: int) -> tuple[Any, Scores | None, dict[str, float]]:
    state, scores, record = self.inner.propose(state, variables, epoch)
    if scores is None or epoch >= self.last_epoch:
      return state, scores, record
    widest = max(group.size for group in self.graph.groups)
    drawn = jax.random.gumbel(jax.random.fold_in(self.key, epoch), (len(self.graph.groups), widest))
    noise = split_by_group(jax.device_get(drawn), self.graph)
    return state, {name: score + noise[name] for name, score in scores.items()}, record


def _sampled(experiment: Experiment) -> Proposer:
  key, last_epoch = experiment.passes.key(Purpose.MASKS), experiment.config.train.epochs - 1
  return Sampled(make_proposer(experiment), experiment.graph, key, last_epoch)


def _batch_statistics(experiment: Experiment) -> Proposer:
  generator: Any = make_proposer(experiment)
  return dataclasses.replace(generator, train=True)


VARIANTS: Mapping[str, Variant] = {
  "weighting=share": Variant(weighting=share_weights),
  "weighting=uniform": Variant(weighting=uniform_weights),
  "masks=sampled": Variant(_sampled),
  "generator_statistics=batch": Variant(_batch_statistics),
  "statistics=batch": Variant(_batch_statistics),
}
"""Last factor of a row's name -> the variant; all other rows run the paper's."""


def variant_of(name: str) -> Variant:
  """Returns the variant that a row of this name runs."""
  return VARIANTS.get(name.rsplit(",", 1)[-1], Variant())
