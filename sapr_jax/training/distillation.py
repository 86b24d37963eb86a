"""Distillation: a network learns from the outputs of another, the dense network before the regularization, too."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Distillation:
  """What the loss of a weight step takes from a teacher, whose variables lie in the state.

  Attributes:
    teacher: The teacher's network.
    weight: Share of the loss that compares with it, in (0, 1].
    temperature: T, by which logits are divided before they are compared.
    first_step: Number of the first step that it teaches.
  """

  teacher: nn.Module
  weight: float
  temperature: float
  first_step: int = 0


def distilled_loss(
  loss: jax.Array, logits: jax.Array, taught: jax.Array, weight: float, temperature: float
) -> jax.Array:
  """Mixes a loss with the divergence from a teacher.

      (1 - weight) loss + weight T^2 KL(softmax(taught / T) || softmax(logits / T))

  T^2 keeps the gradients of the second term as large as those of the first, whatever T is.

  Args:
    loss: Loss on the labels, scalar.
    logits: `[batch, classes]`.
    taught: The teacher's logits, `[batch, classes]`.
    weight: Share of the second term.
    temperature: T.

  Returns:
    Scalar.

  References:
    Hinton et al., Distilling the knowledge in a neural network, 2015.
  """
  divergence = optax.losses.kl_divergence_with_log_targets(
    jax.nn.log_softmax(logits / temperature), jax.nn.log_softmax(taught / temperature)
  )
  return (1.0 - weight) * loss + weight * temperature**2 * jnp.mean(divergence)
