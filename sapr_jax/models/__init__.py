"""Networks of the paper's experiments: ordinary Flax modules that know nothing of pruning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from sapr_jax.errors import InputError
from sapr_jax.models.resnet import BasicBlock, CifarResNet

MODELS: dict[str, Callable[..., nn.Module]] = {
  f"resnet{depth}": functools.partial(CifarResNet, depth=depth) for depth in (8, 14, 20, 32, 44, 56, 110)
}
"""Name -> constructor, for `create` and the config field `model.name`."""

CLASSES: dict[str, type[nn.Module]] = {"CifarResNet": CifarResNet}
"""Class name -> class, for definitions of models on disk."""


def create(name: str, **fields: Any) -> nn.Module:
  """Creates the network called `name`; `fields` overrides fields of its module.

  Raises:
    InputError: If the name or a field is unknown.

  Example:
    >>> create("resnet56", num_classes=100).depth
    56
  """
  if name not in MODELS:
    raise InputError(f"The model {name!r} is unknown; expected one of {', '.join(MODELS)}.")
  try:
    return MODELS[name](**fields)
  except TypeError as error:
    raise InputError(f"The model {name!r} does not take these fields ({error}).") from error


__all__ = ["CLASSES", "MODELS", "BasicBlock", "CifarResNet", "create"]
