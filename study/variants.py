"""Variants of the method: choices that the supplement leaves open, as functions that a run is given.

The last factor of a row's name says which variant it runs (`Row.variant`). So a work directory, which is named by its
row, cannot be resumed with another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sapr_jax.method import share_weights
from sapr_jax.training import Variant


def uniform_weights(dropped: jax.Array) -> jax.Array:
  """Gives each of the K groups the weight 1 / K, however many channels it drops."""
  return jnp.full(dropped.shape, 1.0 / len(dropped))


def sampled_masks(last_epoch: int) -> Callable[[np.ndarray, int, jax.Array], np.ndarray]:
  """Returns a function that ranks channels by o + g of Eq. 1 in place of o, with other noise g in each epoch.

  The masks of the last epoch are cut, so that these are the most likely ones.
  """

  def add_noise(outputs: np.ndarray, epoch: int, key: jax.Array) -> np.ndarray:
    if epoch >= last_epoch:
      return outputs
    return outputs + np.asarray(jax.random.gumbel(jax.random.fold_in(key, epoch), outputs.shape, outputs.dtype))

  return add_noise


def _batch_statistics(config: ConfigDict) -> Variant:
  del config
  return Variant(batch_statistics=True)


VARIANTS: Mapping[str, Callable[[ConfigDict], Variant]] = {
  "weighting=share": lambda config: Variant(weighting=share_weights),
  "weighting=uniform": lambda config: Variant(weighting=uniform_weights),
  "masks=sampled": lambda config: Variant(masks=sampled_masks(config.train.epochs - 1)),
  "hold_epoch=6": lambda config: Variant(renew=lambda epoch: epoch < 6),
  "generator_statistics=batch": _batch_statistics,
  "statistics=batch": _batch_statistics,
}
"""Last factor of a row's name -> the variant, from the configuration; all other rows run the paper's."""


def variant_of(name: str, config: ConfigDict) -> Variant:
  """Returns the variant that a row of this name runs."""
  factor = name.rsplit(",", 1)[-1]
  return VARIANTS[factor](config) if factor in VARIANTS else Variant()
