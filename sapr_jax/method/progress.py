"""How far a search has come: which share of the channels two rankings keep alike, and how much of one was learned."""

from __future__ import annotations

import numpy as np

from sapr_jax.channels import Masks


def overlap(masks: Masks, other: Masks) -> float:
  """Returns the share of the channels kept by `masks` that `other` keeps too.

  Example:
    >>> import numpy as np
    >>> overlap({"conv": np.array([1, 1, 0, 0])}, {"conv": np.array([0, 1, 1, 0])})
    0.5
  """
  both = sum(int(np.sum((np.asarray(mask) > 0) & (np.asarray(other[name]) > 0))) for name, mask in masks.items())
  return both / sum(int(np.sum(mask)) for mask in masks.values())


def learned_share(masks: Masks, untrained: Masks) -> float:
  """Returns how much of the choice in `masks` is not that of `untrained`: 0 if they are the same, 1 if independent.

      (1 - overlap) / (1 - chance)

  where chance is the overlap to expect of masks that know nothing of each other, the share of all channels that
  `untrained` keeps. Where all are kept nothing was to be chosen, and the result is 1.

  Example:
    >>> import numpy as np
    >>> learned_share({"conv": np.array([1, 1, 0, 0])}, {"conv": np.array([0, 1, 1, 0])})
    1.0
  """
  chance = sum(float(np.sum(mask)) for mask in untrained.values()) / sum(map(np.size, untrained.values()))
  return 1.0 if chance == 1.0 else (1.0 - overlap(masks, untrained)) / (1.0 - chance)
