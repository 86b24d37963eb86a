"""What the generator minimizes: the search for the sub-network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax
import jax

from sapr_jax.channels import ChannelGraph, Masks
from sapr_jax.method.budget import macs_penalty
from sapr_jax.method.generator import ArchitectureGenerator, sample_masks, split_by_group


@flax.struct.dataclass
class SearchMetrics:
  """What `architecture_loss` is made of.

  Attributes:
    loss: The loss of the sampled sub-network, scalar.
    macs_share: Its share of the prunable MACs, scalar.
  """

  loss: jax.Array
  macs_share: jax.Array


def architecture_loss(
  generator: ArchitectureGenerator,
  variables: Any,
  graph: ChannelGraph,
  loss_fn: Callable[[Masks], jax.Array],
  key: jax.Array,
  *,
  p: float,
  macs_weight: float = 4.0,
  bias: float = 3.0,
  temperature: float = 0.4,
) -> tuple[jax.Array, SearchMetrics]:
  """Draws a sub-network and says how good and how cheap it is.

      loss_fn(v) + lambda log(max(T(v), p T_total) / (p T_total)),   v drawn by Eq. 1

  Differentiate it with respect to `variables["params"]`; the weights of the network stay as they are.

  Args:
    generator: The architecture generator.
    variables: Its variables.
    graph: The channel graph of the network.
    loss_fn: Masks -> the loss of the sub-network on a batch, scalar, without a change of anything; see `masked_apply`.
    key: Randomness of the draw.
    p: Share of the prunable MACs to keep, in (0, 1].
    macs_weight: lambda.
    bias: b of Eq. 1.
    temperature: tau of Eq. 1.

  Returns:
    (the objective, its parts).

  References:
    Gao et al., ICCV 2023, supplement A, Eq. 1; `macs_penalty` for the second term.
  """
  outputs: Any = generator.apply(variables)
  masks = split_by_group(sample_masks(key, outputs, bias=bias, temperature=temperature), graph)
  loss = loss_fn(masks)
  share = graph.prunable_macs(masks) / graph.prunable_macs()
  return loss + macs_weight * macs_penalty(graph, masks, p), SearchMetrics(loss, share)
