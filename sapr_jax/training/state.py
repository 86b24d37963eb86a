"""State that training changes, and that a checkpoint holds."""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sapr_jax.channels import Masks
from sapr_jax.errors import InputError
from sapr_jax.method import get_masks, set_masks


@flax.struct.dataclass
class TrainState:
  """State of a stage: training with the method, or fine-tuning.

  Attributes:
    step: Optimizer steps taken, int32 scalar.
    params: Parameters of the network.
    batch_stats: Running statistics of the batch normalizations, {} if there are none.
    opt_state: State of the optimizer; with the regularization, the masks in force are in it.
    proposer: State of what proposes masks, such as the architecture generator; () if there is none.
    teacher: Variables of the network that is distilled from; () if none is.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: optax.OptState
  proposer: Any
  teacher: Any = ()

  @classmethod
  def create(
    cls, variables: Any, tx: optax.GradientTransformation, *, masks: Any = None, proposer: Any = (), teacher: Any = ()
  ) -> TrainState:
    """Makes the state of a network that has taken no step; masks are for a `tx` with the regularization."""
    opt_state = jax.jit(tx.init)(variables["params"])  # one program in place of one for each shape
    return cls(
      step=jnp.zeros((), jnp.int32),
      params=variables["params"],
      batch_stats=variables.get("batch_stats", {}),
      opt_state=set_masks(opt_state, masks) if masks else opt_state,
      proposer=proposer,
      teacher=teacher,
    )

  @property
  def masks(self) -> Masks:
    """Group name -> 0/1 array: the masks in force; {} in fine-tuning."""
    try:
      return get_masks(self.opt_state)
    except InputError:
      return {}

  @property
  def variables(self) -> dict[str, Any]:
    """The variables for `model.apply`."""
    return {"params": self.params, **({"batch_stats": self.batch_stats} if self.batch_stats else {})}


def first_not_finite(tree: Any) -> str | None:
  """Names the first tensor of a tree with an entry that is not finite; None if all are."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(tree)):  # nothing to compile
    if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.isfinite(leaf).all():
      return jax.tree_util.keystr(path, simple=True, separator="/")
  return None
