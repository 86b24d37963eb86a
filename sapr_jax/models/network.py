"""What the networks of this package have in common: fields that are checked when the network is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from sapr_jax.checks import check_dtype, is_integer, is_number, shown
from sapr_jax.errors import InputError


def _is_bool(value: Any) -> bool:
  return isinstance(value, bool)


def _is_between(low: float, high: float) -> Callable[[Any], bool]:
  return lambda value: is_number(value) and bool(low <= value <= high)


def _is_count(high: int) -> Callable[[Any], bool]:
  return lambda value: is_integer(value) and bool(1 <= value <= high)


def _is_floating(value: Any) -> bool:
  return bool(jnp.issubdtype(check_dtype("dtype", value), jnp.floating))


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
  "blocks": (
    lambda value: isinstance(value, tuple | list) and bool(value) and all(map(_is_count(1000), value)),
    "the number of blocks in each stage, such as (3, 4, 6, 3)",
  ),
  "bottleneck": (_is_bool, "True or False"),
  "depth": (
    lambda value: _is_count(9998)(value) and value >= 8 and value % 6 == 2,
    "6 n + 2 for n blocks in a stage: 8, 14, 20, 32, 44, 56, 110",
  ),
  "dropout": (_is_between(0, 0.999), "a number in [0, 1)"),
  "dtype": (_is_floating, "a floating dtype, such as jnp.bfloat16"),
  "layers": (_is_count(1000), "an integer of at least 1"),
  "num_heads": (_is_count(1000), "an integer of at least 1"),
  "patch_size": (_is_count(1000), "an integer of at least 1, in pixels"),
  "num_classes": (_is_count(10**6), "an integer of at least 1 and at most a million"),
  "remat": (_is_bool, "True or False"),
  "small_images": (_is_bool, "True or False"),
  "width_multiplier": (_is_between(1e-30, 1000), "a number above 0 and at most 1000"),
}
"""Name of a field -> whether a value is allowed, and the allowed ones in words."""


class Network(nn.Module):
  """Base of the networks; raises `InputError` for a field that cannot be."""

  def __post_init__(self) -> None:
    for name, (is_good, must) in _FIELDS.items():
      if hasattr(self, name) and not is_good(value := getattr(self, name)):
        raise InputError(f"{name} of a {type(self).__name__} must be {must}, got {shown(value)}.")
    super().__post_init__()
