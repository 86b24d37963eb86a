"""Networks of the paper's experiments, and a transformer: ordinary Flax modules that know nothing of pruning."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn

from sapr_jax.checks import shown
from sapr_jax.errors import InputError
from sapr_jax.models import mobilenet_v2, resnet
from sapr_jax.models.fast_layers import has_fast_layers, with_fast_layers
from sapr_jax.models.mobilenet_v2 import InvertedResidual, MobileNetV2
from sapr_jax.models.resnet import BasicBlock, Bottleneck, CifarResNet, ResNet
from sapr_jax.models.vit import EncoderBlock, VisionTransformer

MODELS: dict[str, Callable[..., nn.Module]] = {
  **{f"resnet{depth}": functools.partial(CifarResNet, depth=depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
  "resnet18": functools.partial(ResNet, blocks=(2, 2, 2, 2), bottleneck=False),
  "resnet34": functools.partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=False),
  "resnet50": functools.partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True),
  "resnet101": functools.partial(ResNet, blocks=(3, 4, 23, 3), bottleneck=True),
  "resnet152": functools.partial(ResNet, blocks=(3, 8, 36, 3), bottleneck=True),
  "mobilenetv2": MobileNetV2,
  "mobilenetv2_cifar": functools.partial(MobileNetV2, num_classes=10, small_images=True, dropout=0.0),
  "vit_tiny": VisionTransformer,
}
"""Name -> constructor, for `create` and the config field `model.name`.

ResNets of depth 8, 14, 20, 32, 44, 56 and 110 are for CIFAR, those of depth 18, 34, 50, 101 and 152 for ImageNet.
"""

CLASSES: dict[str, type[nn.Module]] = {
  cls.__name__: cls for cls in (CifarResNet, ResNet, MobileNetV2, VisionTransformer)
}
"""Class name -> class, for definitions of models on disk."""

TORCH_NAMES: dict[type[nn.Module], Callable[[Iterable[str]], dict[str, str]]] = {
  CifarResNet: resnet.torch_names,
  ResNet: resnet.torch_names,
  MobileNetV2: mobilenet_v2.torch_names,
}
"""Class -> function of the paths of its layers that returns their names in torchvision."""


def create(name: str, **fields: Any) -> nn.Module:
  """Creates the network called `name`; `fields` overrides fields of its module.

  Raises:
    InputError: If the name or a field is unknown, or a field cannot have that value.

  Example:
    >>> create("resnet56", num_classes=100).depth
    56
  """
  if not isinstance(name, str) or name not in MODELS:
    raise InputError(f"The model {shown(name)} is unknown; expected one of {', '.join(MODELS)}.")
  try:
    return MODELS[name](**fields)
  except TypeError as error:
    raise InputError(f"The model {name!r} does not take these fields ({error}).") from error


__all__ = [
  "CLASSES",
  "MODELS",
  "TORCH_NAMES",
  "BasicBlock",
  "Bottleneck",
  "CifarResNet",
  "EncoderBlock",
  "InvertedResidual",
  "MobileNetV2",
  "ResNet",
  "VisionTransformer",
  "create",
  "has_fast_layers",
  "with_fast_layers",
]
