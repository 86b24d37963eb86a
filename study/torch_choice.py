"""Channels that Torch-Pruning chooses by group norm, in a run of this package: so the choice alone is compared."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import torch
import torch_pruning

from sapr_jax import training
from sapr_jax.artifacts.torch_names import name_layers
from sapr_jax.channels import ChannelGraph, Masks
from sapr_jax.channels.trees import path_of
from sapr_jax.method import Scores
from sapr_jax.training import Experiment
from study import torch_runs
from study.ours import budget_macs
from study.rows import Job


@dataclasses.dataclass(frozen=True)
class Chosen:
  """Ranks the channels that Torch-Pruning keeps above all others.

  It cuts the same few percent of all channels at each step, so that it ends a little below the budget; what is left of
  that goes to others of its channels.
  """

  model: nn.Module
  graph: ChannelGraph
  input_shape: tuple[int, ...]
  p: float

  def init(self) -> Any:
    return ()

  def propose(self, state: Any, variables: Any, epoch: int) -> tuple[Any, Scores, dict[str, float]]:
    masks = kept_by_group_norm(self.model, jax.device_get(variables), self.graph, self.input_shape, self.p)
    return state, masks, {}


def run_choice(job: Job) -> None:
  """Runs the method with these channels; raises what `training.run` does."""

  def chosen(experiment: Experiment) -> Chosen:
    return Chosen(experiment.model, experiment.graph, experiment.input_shape, experiment.config.prune.p)

  training.run(job.config, job.workdir, proposer=chosen)


def kept_by_group_norm(
  model: nn.Module, variables: Any, graph: ChannelGraph, input_shape: tuple[int, ...], p: float
) -> Masks:
  """Returns the masks of what Torch-Pruning keeps of a network at a budget, see `torch_runs.make_pruner`.

  Args:
    model: A CIFAR ResNet, or a MobileNet-V2.
    variables: Its variables.
    graph: Its channel graph, of whole axes.
    input_shape: `[1, height, width, channels]`.
    p: The budget, as `prune.p`.

  Returns:
    Group name -> 0/1 array `[group.size]`.
  """
  inputs = torch.zeros(1, input_shape[3], *input_shape[1:3])
  network = torch_runs.make_network(model, variables)
  pruner = torch_runs.make_pruner(network, inputs, 0.0)
  torch_runs.cut(pruner, network, inputs, budget_macs(graph, p))

  # The same is cut out of a network whose scales are the numbers of their channels; what is left are those kept.
  scales = {
    group.name: next(member.path for member in group.members if member.path[-1] == "scale") for group in graph.groups
  }
  numbered = jax.tree_util.tree_map_with_path(
    lambda place, leaf: np.arange(len(leaf), dtype=np.float32) if path_of(place) in scales.values() else leaf,
    variables["params"],
  )
  copied = torch_runs.make_network(model, {**variables, "params": numbered})
  dependencies = torch_pruning.DependencyGraph().build_dependency(copied, example_inputs=inputs)
  dependencies.load_pruning_history(pruner.DG.pruning_history())
  names = name_layers(model, {"/".join(path[:-1]) for collection, *path in graph.shapes if collection == "params"})
  left = copied.state_dict()
  masks = {}
  for group in graph.groups:
    numbers = left[f"{names['/'.join(scales[group.name][:-1])]}.weight"]
    masks[group.name] = np.isin(np.arange(group.size), numbers.round().int().numpy()).astype(np.float32)
  return masks
