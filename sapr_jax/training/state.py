"""What training changes: the network's state and the generator's."""

from __future__ import annotations

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class NetworkState:
  """State of the network, dense or pruned.

  Attributes:
    step: Optimizer steps taken, int32 scalar.
    params: Parameters.
    batch_stats: Running statistics of the batch normalizations, {} if there are none.
    opt_state: State of the optimizer.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: optax.OptState

  @property
  def variables(self) -> dict[str, Any]:
    """The variables for `model.apply`."""
    return {"params": self.params, **({"batch_stats": self.batch_stats} if self.batch_stats else {})}


@flax.struct.dataclass
class GeneratorState:
  """State of the architecture generator.

  Attributes:
    step: Optimizer steps taken, int32 scalar.
    params: Parameters.
    constants: The fixed input z.
    opt_state: State of its optimizer.
  """

  step: jax.Array
  params: Any
  constants: Any
  opt_state: optax.OptState

  @property
  def variables(self) -> dict[str, Any]:
    """The variables for `generator.apply`."""
    return {"params": self.params, "constants": self.constants}


def first_not_finite(tree: Any) -> str | None:
  """Names the first tensor of a tree with an entry that is not finite; None if all are."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.all(jnp.isfinite(leaf))):
      return jax.tree_util.keystr(path, simple=True, separator="/")
  return None


def network_state(variables: Any, tx: optax.GradientTransformation) -> NetworkState:
  """Makes the state of a network that has taken no step."""
  return NetworkState(
    step=jnp.zeros((), jnp.int32),
    params=variables["params"],
    batch_stats=variables.get("batch_stats", {}),
    opt_state=tx.init(variables["params"]),
  )


def generator_state(generator: nn.Module, tx: optax.GradientTransformation, key: jax.Array) -> GeneratorState:
  """Initializes the generator."""
  variables = generator.init(key)
  return GeneratorState(
    step=jnp.zeros((), jnp.int32),
    params=variables["params"],
    constants=variables["constants"],
    opt_state=tx.init(variables["params"]),
  )
