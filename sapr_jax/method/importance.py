"""Importance of channels without learning: scores from the weights, and how to compare them between groups.

Each takes `(params, graph, ...)` and returns scores, higher is kept first, for `project_to_budget`. All can be called
under `jax.jit`.

Scores of different groups have different scales, and `project_to_budget` ranks all channels together. So pass scores
through `relative_to_group_mean`, or through `rank_within_groups` where every group shall keep the same share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapr_jax.channels import ChannelGraph, Member, check_graph, check_params, map_members
from sapr_jax.checks import check_key
from sapr_jax.errors import InputError
from sapr_jax.method.budget import check_scores
from sapr_jax.method.channel_norms import channel_sums, is_kernel, is_producer, is_reader
from sapr_jax.method.cost import COSTS, Cost

Scores = Mapping[str, Any]
"""Group name -> array `[group.size]`; channels with higher scores are kept first."""


def l1_norm(params: Any, graph: ChannelGraph) -> dict[str, jax.Array]:
  """Scores channels by the L1 norms of the filters that produce them.

      score[c] = sum_m sum |w[m, c]|,   m over the kernels that have the group as output channels

  Most groups have one such kernel; a depthwise convolution adds its own. Readers, biases and normalizations do not
  count.

  Args:
    params: Parameters of the dense network.
    graph: Its channel graph.

  Returns:
    Group name -> `[group.size]`, at least 0.

  Raises:
    InputError: If `params` does not fit `graph`.

  Example:
    >>> import flax.linen as nn
    >>> import jax.numpy as jnp
    >>> import sapr_jax as sapr
    >>> model = nn.Sequential([nn.Dense(2, use_bias=False), nn.relu, nn.Dense(1, use_bias=False)])
    >>> params = {
    ...   "layers_0": {"kernel": jnp.array([[3.0, 1.0], [-4.0, 0.0]])},
    ...   "layers_2": {"kernel": jnp.array([[2.0], [6.0]])},
    ... }
    >>> graph = sapr.trace_channels(model, {"params": params}, (1, 2), select="unjoined")
    >>> sapr.l1_norm(params, graph)
    {'layers_0': Array([7., 1.], dtype=float32)}

  References:
    Li et al., Pruning filters for efficient ConvNets, 2017.
  """
  return _total(channel_sums(params, graph, jnp.abs, is_producer))


def l2_norm(params: Any, graph: ChannelGraph) -> dict[str, jax.Array]:
  """Scores channels by the L2 norm of all kernels of their group, producers and readers alike.

      score[c] = sqrt(sum_m ||w[m, c]||_2^2),   m over the kernels that have the group as output or as input channels

  Biases and normalizations do not count. A channel is then important by the weights that make it and by those that use
  it, which is also what `partial_group_lasso` shrinks.

  Args:
    params: Parameters of the dense network.
    graph: Its channel graph.

  Returns:
    Group name -> `[group.size]`, at least 0.

  Raises:
    InputError: If `params` does not fit `graph`.

  Example:
    >>> import flax.linen as nn
    >>> import jax.numpy as jnp
    >>> import sapr_jax as sapr
    >>> model = nn.Sequential([nn.Dense(2, use_bias=False), nn.relu, nn.Dense(1, use_bias=False)])
    >>> params = {
    ...   "layers_0": {"kernel": jnp.array([[3.0, 1.0], [-4.0, 0.0]])},
    ...   "layers_2": {"kernel": jnp.array([[12.0], [0.0]])},
    ... }
    >>> graph = sapr.trace_channels(model, {"params": params}, (1, 2), select="unjoined")
    >>> sapr.l2_norm(params, graph)
    {'layers_0': Array([13.,  1.], dtype=float32)}

  References:
    Fang et al., DepGraph: towards any structural pruning, 2023, for the norm over a group.
  """
  return {name: jnp.sqrt(total) for name, total in _total(channel_sums(params, graph, jnp.square, is_kernel)).items()}


def batch_norm_scale(params: Any, graph: ChannelGraph) -> dict[str, jax.Array]:
  """Scores channels by the scales of the normalizations along their group.

      score[c] = mean of |scale| over the entries of channel c in all normalizations of the group

  A normalization is known by its parameter `scale`, as Flax names it.

  Args:
    params: Parameters of the dense network.
    graph: Its channel graph.

  Returns:
    Group name -> `[group.size]`, at least 0.

  Raises:
    InputError: If `params` does not fit `graph`, or a group has no normalization with a scale.

  Example:
    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import sapr_jax as sapr
    >>> norm = nn.BatchNorm(use_running_average=True)
    >>> model = nn.Sequential([nn.Dense(2), norm, nn.relu, nn.Dense(1)])
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> graph = sapr.trace_channels(model, variables, (1, 2), select="unjoined")
    >>> params = {**variables["params"], "layers_1": {"scale": jnp.array([0.5, -2.0]), "bias": jnp.zeros(2)}}
    >>> sapr.batch_norm_scale(params, graph)
    {'layers_0': Array([0.5, 2. ], dtype=float32)}

  References:
    Liu et al., Learning efficient convolutional networks through network slimming, 2017.
  """
  scales = channel_sums(params, graph, jnp.abs, _is_scale)
  for name, found in scales.items():
    if not found:
      raise InputError(
        f"batch_norm_scale needs a normalization with a scale along every group, got none along {name!r}; use l1_norm"
        " or l2_norm, or leave the group out by trace_channels(exclude=...)."
      )
  entries = _total(channel_sums(params, graph, jnp.ones_like, _is_scale))
  return {name: total / entries[name] for name, total in _total(scales).items()}


def taylor(params: Any, graph: ChannelGraph, grads: Any) -> dict[str, jax.Array]:
  """Scores channels by how much the loss changes without them, to first order.

      score[c] = |sum_m <w[m, c], dL/dw[m, c]>|,   m over the kernels that read channel c

  This is |dL/dmask[c]| at a mask of ones: the gate of a channel multiplies the kernels that read it, see `mask_params`.
  Producers would count the same change twice, or add nothing: under a batch normalization that uses the statistics of
  its batch, the loss does not change with the scale of a filter, so that <w, dL/dw> is 0.

  Args:
    params: Parameters of the dense network.
    graph: Its channel graph.
    grads: Gradient of the loss with respect to `params`, best the mean over many images.

  Returns:
    Group name -> `[group.size]`, at least 0.

  Raises:
    InputError: If `params` or `grads` does not fit `graph`.

  Example:
    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import sapr_jax as sapr
    >>> model = nn.Sequential([nn.Dense(2, use_bias=False), nn.relu, nn.Dense(1, use_bias=False)])
    >>> params = {
    ...   "layers_0": {"kernel": jnp.array([[3.0, 1.0], [-1.0, 0.0]])},
    ...   "layers_2": {"kernel": jnp.array([[2.0], [-6.0]])},
    ... }
    >>> graph = sapr.trace_channels(model, {"params": params}, (1, 2), select="unjoined")
    >>> loss_fn = lambda params: model.apply({"params": params}, jnp.ones((1, 2))).sum()  # 2 * 2 - 6 * 1
    >>> sapr.taylor(params, graph, jax.grad(loss_fn)(params))
    {'layers_0': Array([4., 6.], dtype=float32)}

  References:
    Molchanov et al., Pruning convolutional neural networks for resource efficient inference, 2017, and Importance
    estimation for neural network pruning, 2019.
  """
  try:
    check_params(grads, graph)
  except InputError as error:
    raise InputError(f"grads must be the gradient with respect to params, got a tree that does not fit: {error}") from (
      error
    )
  products = map_members(lambda leaf, members: leaf * members[0][1].get(grads), params, graph)
  return {name: jnp.abs(total) for name, total in _total(channel_sums(products, graph, lambda x: x, is_reader)).items()}


def random(params: Any, graph: ChannelGraph, key: jax.Array) -> dict[str, jax.Array]:
  """Scores channels at random, uniformly in [0, 1): the baseline for the others. At top level: `random_scores`.

  Args:
    params: Not used.
    graph: The channel graph.
    key: Randomness.

  Returns:
    Group name -> `[group.size]`.

  Example:
    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import sapr_jax as sapr
    >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(1)])
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> graph = sapr.trace_channels(model, variables, (1, 2), select="unjoined")
    >>> {name: scores.shape for name, scores in sapr.random_scores(variables, graph, jax.random.key(1)).items()}
    {'layers_0': (4,)}
  """
  del params
  check_graph(graph)
  check_key(key)
  keys = jax.random.split(key, len(graph.groups))
  return {group.name: jax.random.uniform(keys[k], (group.size,)) for k, group in enumerate(graph.groups)}


IMPORTANCES: dict[str, Callable[..., dict[str, jax.Array]]] = {
  "l1_norm": l1_norm,
  "l2_norm": l2_norm,
  "batch_norm_scale": batch_norm_scale,
  "taylor": taylor,
  "random": random,
}
"""Name -> function of (params, graph); "taylor" takes the gradients besides, "random" a key."""


def rank_within_groups(scores: Scores) -> dict[str, jax.Array]:
  """Replaces scores by ranks in (0, 1], so that all groups keep the same share of their channels.

      rank[c] = (number of channels in the group that do not come after c) / size,   ascending by score

  Of equal scores the later channel ranks higher. A NaN stays one, for `project_to_budget` to refuse.

  Example:
    >>> import jax.numpy as jnp
    >>> import sapr_jax as sapr
    >>> sapr.rank_within_groups({"conv": jnp.array([4.0, 1.0, 3.0, 8.0])})
    {'conv': Array([0.75, 0.25, 0.5 , 1.  ], dtype=float32)}

  References:
    Li et al., Pruning filters for efficient ConvNets, 2017, keep equal shares within a stage.
  """

  def rank(values: jax.Array) -> jax.Array:
    # A table in place of a division, which a compiler may round otherwise: shares that are equal must stay so.
    shares = jnp.asarray(np.arange(1, values.size + 1) / values.size, jnp.float32)
    return jnp.where(jnp.isnan(values), jnp.nan, shares[jnp.argsort(jnp.argsort(values))])

  check_scores(scores)
  return {name: rank(jnp.asarray(values)) for name, values in scores.items()}


def relative_to_group_mean(scores: Scores) -> dict[str, jax.Array]:
  """Divides scores by the mean of their group, so that channels of different groups can compete.

  For scores of at least 0, as norms are. A group whose scores are all 0 keeps them.

  Example:
    >>> import jax.numpy as jnp
    >>> import sapr_jax as sapr
    >>> sapr.relative_to_group_mean({"wide": jnp.array([1.0, 3.0]), "narrow": jnp.array([20.0])})
    {'wide': Array([0.5, 1.5], dtype=float32), 'narrow': Array([1.], dtype=float32)}
  """
  check_scores(scores)
  means = {name: jnp.mean(jnp.asarray(values)) for name, values in scores.items()}
  return {name: jnp.asarray(scores[name]) / jnp.where(mean == 0, 1.0, mean) for name, mean in means.items()}


def slopes(graph: ChannelGraph, cost: Cost) -> np.ndarray:
  """Returns what a channel of each group costs in the dense network, `[K]`: the slope in the width, above zero."""
  slope = jax.grad(lambda kept: jnp.asarray(cost(kept), jnp.float32))(jnp.asarray(graph.kept(), jnp.float32))
  return np.maximum(np.asarray(slope, np.float64), 1e-12)


def prices(graph: ChannelGraph, cost: Cost, exponent: float) -> dict[str, float]:
  """Returns a power of what a parameter of each group costs, in the dense network and relative to the cheapest.

      price = (slope of the cost in the width of the group / slope of the number of parameters)^exponent

  In MACs that is the number of places where a kernel is applied: a head of attention, which has more parameters than a
  hidden unit, is not dearer for that.

  Example:
    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import sapr_jax as sapr
    >>> model = nn.Sequential([nn.Conv(2, (3, 3)), nn.relu, nn.Conv(8, (3, 3), strides=2), nn.relu, nn.Conv(2, (3, 3))])
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> graph = sapr.trace_channels(model, variables, (1, 8, 8, 1), select="unjoined")
    >>> found = prices(graph, sapr.macs_budget(graph, 0.5).cost, 0.5)
    >>> {name: round(price, 2) for name, price in found.items()}  # at 8 x 8 and 4 x 4 places; at 4 x 4
    {'layers_0': 1.16, 'layers_2': 1.0}
  """
  per_parameter = slopes(graph, cost) / slopes(graph, COSTS["params"](graph))
  relative = (per_parameter / per_parameter.min()) ** exponent
  return {group.name: float(price) for group, price in zip(graph.groups, relative, strict=True)}


def _compare_with_mean(scores: Scores, graph: ChannelGraph, cost: Cost, exponent: float) -> dict[str, jax.Array]:
  price = prices(graph, cost, exponent)
  return {name: values / price[name] for name, values in relative_to_group_mean(scores).items()}


def _compare_by_share(scores: Scores, graph: ChannelGraph, cost: Cost, exponent: float) -> dict[str, jax.Array]:
  price = prices(graph, cost, exponent)
  # Above a threshold t lies the share (1 - t) / price of each group, up to rounding.
  return {name: 1 - (1 - ranks) * price[name] for name, ranks in rank_within_groups(scores).items()}


COMPARISONS: dict[str, Callable[[Scores, ChannelGraph, Cost, float], dict[str, jax.Array]]] = {
  "group_mean": _compare_with_mean,
  "equal_shares": _compare_by_share,
}
"""Name -> what makes the scores of different groups comparable; the last argument is the exponent of the cost."""


def make_comparable(
  scores: Scores, graph: ChannelGraph, cost: Cost, *, compare: str, cost_exponent: float
) -> dict[str, jax.Array]:
  """Makes the scores of different groups comparable, for `project_to_budget`.

  Args:
    scores: Scores of at least 0.
    graph: The channel graph.
    cost: What the budget limits.
    compare: "group_mean" divides scores by the mean of their group and by its price; "equal_shares" lets each group
      keep a share of its channels that is the same for all but for the price, by which it is divided.
    cost_exponent: See `prices`; with 0 all prices are the same.
  """
  return COMPARISONS[compare](scores, graph, cost, cost_exponent)


def score_channels(
  name: str, params: Any, graph: ChannelGraph, *, gradients: Callable[[], Any], key: Callable[[], jax.Array]
) -> dict[str, jax.Array]:
  """Computes the importance of that name; the two functions give what "taylor" and "random" take besides."""
  if name == "random":
    return random(params, graph, key())
  if name == "taylor":
    return taylor(params, graph, gradients())
  return IMPORTANCES[name](params, graph)


def _is_scale(member: Member) -> bool:
  return member.role == "vector" and member.path[-1] == "scale"


def _total(sums: Mapping[str, list[jax.Array]]) -> dict[str, jax.Array]:
  return {name: sum(arrays[1:], arrays[0]) for name, arrays in sums.items()}
