"""PyTorch networks in evaluation mode, to compare with, and Torch-Pruning's. Needs torch and torch-pruning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning
from torch import nn

from benchmarks import torch_networks
from benchmarks.measuring import time_in_turns
from benchmarks.torch_networks import count_macs


def create(name: str) -> nn.Module:
  """Creates the PyTorch network of the name that it has in `sapr_jax.models`, with random weights."""
  constructors: dict[str, Callable[[], nn.Module]] = {
    "resnet50": torch_networks.resnet50,
    "resnet56": lambda: torch_networks.CifarResNet(56),
    "mobilenetv2": torch_networks.MobileNetV2,
  }
  return torch_networks.randomize(constructors[name]())


def prune_to_macs(model: nn.Module, head: str, macs: float, image_size: int, tolerance: float = 0.01) -> nn.Module:
  """Prunes by Torch-Pruning: group norms, one ratio for all layers, which is searched so that the MACs are `macs`.

  Args:
    model: The dense network; stays as it is.
    head: Name of the layer whose outputs are the logits.
    macs: What the pruned network shall have.
    image_size: Height and width of its images.
    tolerance: Relative deviation of the MACs at which the search ends.

  Raises:
    RuntimeError: If no ratio comes so close.
  """
  shape = (3, image_size, image_size)
  kept = (macs / count_macs(model, shape)) ** 0.5  # MACs go with the square of the width
  for _ in range(6):
    pruned = copy.deepcopy(model)
    torch_pruning.pruner.MagnitudePruner(
      pruned,
      torch.zeros(1, *shape),
      importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
      pruning_ratio=1 - kept,
      ignored_layers=[pruned.get_submodule(head)],
    ).step()
    found = count_macs(pruned, shape)
    if abs(found - macs) <= tolerance * macs:
      return pruned
    kept *= (macs / found) ** 0.5
  raise RuntimeError(f"Torch-Pruning gives no network of {macs:,.0f} MACs; the last had {found:,}.")


def inference(model: nn.Module, batch: int, image_size: int, *, dtype: str) -> tuple[Callable[[], None], str]:
  """Returns a call that computes the logits of a batch and waits for them, and how it does that.

  On a GPU, where there is one: compiled, channels last, and with TF32, as XLA does. Else in the faster memory format.

  Args:
    model: The network, in evaluation mode.
    batch: Images of a call; they lie on the device.
    image_size: Their height and width.
    dtype: Of weights and images: float32 or bfloat16.
  """
  if torch.cuda.is_available():
    torch.set_float32_matmul_precision("high")
    return _call(model, batch, image_size, dtype, torch.channels_last, "cuda"), "compiled, channels last"
  formats = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
  calls = {name: _call(model, batch, image_size, dtype, layout, "cpu") for name, layout in formats.items()}
  seconds = time_in_turns(calls, rounds=2, warm_up=1)
  fastest = min(calls, key=lambda name: min(seconds[name]))
  return calls[fastest], f"eager, {fastest}"


def _call(model: Any, batch: int, size: int, dtype: str, layout: Any, device: str) -> Callable[[], None]:
  placing: Any = {"device": device, "dtype": getattr(torch, dtype), "memory_format": layout}
  network = copy.deepcopy(model).to(**placing)
  if device == "cuda":
    network.compile(dynamic=False)  # with the default settings
  images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(**placing)

  def call() -> None:
    with torch.no_grad():
      network(images)
    if device == "cuda":
      torch.cuda.synchronize()

  return call


def forget_compiled() -> None:
  """Forgets what `torch.compile` has made: it gives up at the eighth version of a function."""
  torch.compiler.reset()
