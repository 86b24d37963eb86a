"""Training steps in PyTorch on random images that lie on the device, to compare with. Needs torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import torch_networks
from benchmarks.training_pieces import LEARNING_RATE, MOMENTUM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

NETWORKS = {
  "resnet20": lambda: torch_networks.CifarResNet(20),
  "resnet56": lambda: torch_networks.CifarResNet(56),
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

  As `training_step.our_calls` does: uint8 images on the device are gathered and normalized, then forward, backward
  and SGD with momentum and weight decay, which is PyTorch's fused one. On a GPU float32 means TF32, as it does for XLA,
  and bfloat16 is automatic mixed precision.

  Args:
    name: A key of `NETWORKS`.
    batch: Images of a step.
    dtype: float32 or bfloat16.
    image_size: Height and width; 1000 classes at 224 pixels, else ten.
    steps_per_call: Steps of a call.
    channels_last: Whether images and kernels lie in memory as NHWC.
    compile_mode: Of `torch.compile`; None does not compile.
  """
  torch.set_float32_matmul_precision("high")
  torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
  layout = torch.channels_last if channels_last else torch.contiguous_format
  network: Any = NETWORKS[name]()
  model = network.to(DEVICE, memory_format=layout).train()
  for module in model.modules():
    if isinstance(module, torch.nn.Dropout):
      module.p = 0.0  # as in ours
  optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=1e-4, fused=True)
  forward = model if compile_mode is None else torch.compile(model, mode=compile_mode)
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
