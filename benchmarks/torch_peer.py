"""PyTorch to compare with: training steps, networks in evaluation mode, and Torch-Pruning's, where that is there."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import torch_networks
from benchmarks.measuring import time_in_turns
from benchmarks.torch_networks import count_macs
from benchmarks.training_pieces import LEARNING_RATE, MOMENTUM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

NETWORKS: dict[str, Callable[[], nn.Module]] = {
  "resnet8": lambda: torch_networks.CifarResNet(8),
  "resnet20": lambda: torch_networks.CifarResNet(20),
  "resnet56": lambda: torch_networks.CifarResNet(56),
  "mobilenetv2": torch_networks.MobileNetV2,
  "mobilenetv2_cifar": lambda: torch_networks.MobileNetV2(num_classes=10, small_images=True),
  "resnet50": torch_networks.resnet50,
}
"""Our name -> the same network in PyTorch."""


def weight_step(
  name: str,
  batch: int,
  *,
  dtype: str = "float32",
  image_size: int = 32,
  steps_per_call: int = 1,
  channels_last: bool = False,
  compile_mode: str | None = None,
) -> Callable[[], None]:
  """Returns a call that trains the network on `steps_per_call` random batches and waits.

  As `training_step.measure` does: uint8 images on the device are gathered and normalized, then forward, backward
  and SGD with momentum and weight decay, which is PyTorch's fused one. On a GPU float32 means TF32, as it does for XLA,
  and bfloat16 is automatic mixed precision.

  Args:
    name: A key of `NETWORKS`.
    batch: Images of a step.
    dtype: float32 or bfloat16.
    image_size: Height and width; 1000 classes at 224 pixels, else ten.
    steps_per_call: Steps of a call.
    channels_last: Whether images and kernels lie in memory as NHWC.
    compile_mode: Of `torch.compile`; None does not compile. On a CPU it only traces, to try the path.
  """
  torch.set_float32_matmul_precision("high")
  torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
  layout = torch.channels_last if channels_last else torch.contiguous_format
  model: Any = NETWORKS[name]()
  model.to(DEVICE, memory_format=layout).train()
  for module in model.modules():
    if isinstance(module, nn.Dropout):
      module.p = 0.0  # as in ours
  optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=1e-4, fused=True)
  forward = model
  if compile_mode is not None:
    forward = torch.compile(model, backend="eager") if DEVICE == "cpu" else torch.compile(model, mode=compile_mode)
  images, labels, order = _data(batch, image_size, steps_per_call)
  precision = torch.autocast(DEVICE, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()

  def call() -> None:
    for rows in order:
      x = images[rows].to(torch.float32, memory_format=layout).div(255).sub(0.5).div(0.25)
      with precision:
        loss = F.cross_entropy(forward(x), labels[rows])
      optimizer.zero_grad(set_to_none=True)
      loss.backward()
      optimizer.step()
    if DEVICE == "cuda":
      torch.cuda.synchronize()

  return call


def create(name: str) -> nn.Module:
  """Creates a network of `NETWORKS` with random weights, in evaluation mode."""
  return torch_networks.randomize(NETWORKS[name]())


def release() -> None:
  """Gives back what is not in use any more: device memory, and programs that `torch.compile` made."""
  torch.compiler.reset()
  if DEVICE == "cuda":
    torch.cuda.empty_cache()


def _data(batch: int, image_size: int, steps: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
  """Returns uint8 images `[N, 3, height, width]`, their labels, and the rows of each batch."""
  generator = torch.Generator().manual_seed(0)
  count, classes = max(batch, 256), 1000 if image_size == 224 else 10
  images = torch.randint(0, 256, (count, 3, image_size, image_size), generator=generator, dtype=torch.uint8)
  labels = torch.randint(0, classes, (count,), generator=generator)
  order = torch.randint(0, count, (steps, batch), generator=generator)
  return images.to(DEVICE), labels.to(DEVICE), list(order.to(DEVICE))


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
    ModuleNotFoundError: If Torch-Pruning is missing.
  """
  import torch_pruning

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


def inference(model: nn.Module, batch: int, image_size: int, *, dtype: str) -> Callable[[], None]:
  """Returns a call that computes the logits of a batch and waits for them.

  On a GPU, where there is one: compiled, channels last, and with TF32, as XLA does. Else in the faster memory format.

  Args:
    model: The network, in evaluation mode.
    batch: Images of a call; they lie on the device.
    image_size: Their height and width.
    dtype: Of weights and images: float32 or bfloat16.
  """
  if DEVICE == "cuda":
    torch.set_float32_matmul_precision("high")
    return _call(model, batch, image_size, dtype, torch.channels_last)
  formats = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
  calls = {name: _call(model, batch, image_size, dtype, layout) for name, layout in formats.items()}
  seconds = time_in_turns(calls, rounds=2, warm_up=1)
  return min(calls.items(), key=lambda item: min(seconds[item[0]]))[1]


def _call(model: Any, batch: int, size: int, dtype: str, layout: Any) -> Callable[[], None]:
  placing: Any = {"device": DEVICE, "dtype": getattr(torch, dtype), "memory_format": layout}
  network = copy.deepcopy(model).to(**placing)
  if DEVICE == "cuda":
    network.compile(dynamic=False)  # with the default settings
  images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(**placing)

  def call() -> None:
    with torch.no_grad():
      network(images)
    if DEVICE == "cuda":
      torch.cuda.synchronize()

  return call
