"""The architecture generator (AGN): a small network that proposes which channels to keep.

References:
  Gao et al., ICCV 2023, supplement A: Table 2 and Eq. 1.
  Jang et al., Categorical reparameterization with Gumbel-softmax, 2016.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sapr_jax.channels import ChannelGraph, check_graph
from sapr_jax.checks import check_array, check_integer, check_key, check_number, shown
from sapr_jax.errors import InputError

Logits = dict[str, jax.Array]
"""Group name -> outputs o_k of the generator, `[group.size]`."""


class ArchitectureGenerator(nn.Module):
  """Translates a fixed random input into one output per channel of every group.

      z [K, 32] -> GRU(32, 64) -> LayerNorm -> GELU -> Dense_k(64, C_k) -> o_k [C_k],  k = 1 .. K

  The GRU runs over the groups in forward order. The K heads have different sizes; they are one padded kernel
  `[K, 64, max C]`, so that they cost one matrix product and compile time does not grow with K.

  Attributes:
    sizes: C_k, the number of channels of each group.
    input_size: Length of each row of z.
    hidden_size: Length of the GRU's state.
  """

  sizes: tuple[int, ...]
  input_size: int = 32
  hidden_size: int = 64

  def __post_init__(self) -> None:
    if not isinstance(self.sizes, tuple | list) or not self.sizes:
      raise InputError(
        f"sizes must be the number of channels of each group, got {shown(self.sizes)}; use"
        " ArchitectureGenerator.for_graph(graph)."
      )
    for name, size in (
      *(("sizes", s) for s in self.sizes),
      ("input_size", self.input_size),
      ("hidden_size", self.hidden_size),
    ):
      check_integer(name, size, 1)
    super().__post_init__()

  @nn.compact
  def __call__(self) -> jax.Array:
    """Returns the outputs, `[K, max C]`; in row k the entries from C_k on mean nothing."""
    num_groups, widest = len(self.sizes), max(self.sizes)
    # z is drawn once and never trained (supplement A), hence a collection of its own.
    z = self.variable(
      "constants", "z", lambda: jax.random.normal(self.make_rng("params"), (num_groups, self.input_size))
    ).value
    h = nn.RNN(nn.GRUCell(self.hidden_size))(z)
    h = nn.gelu(nn.LayerNorm(name="norm")(h), approximate=False)
    init = nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)
    kernel = self.param("heads_kernel", init, (num_groups, self.hidden_size, widest))
    bias = self.param("heads_bias", nn.initializers.zeros_init(), (num_groups, widest))
    return jnp.einsum("kh,khc->kc", h, kernel) + bias

  @classmethod
  def for_graph(cls, graph: ChannelGraph) -> ArchitectureGenerator:
    """Creates the generator for the groups of `graph`."""
    check_graph(graph)
    return cls(tuple(group.size for group in graph.groups))


def split_by_group(padded: jax.Array, graph: ChannelGraph) -> dict[str, jax.Array]:
  """Splits `[K, max C]` into group name -> `[group.size]`."""
  check_graph(graph)
  check_array("padded", padded, (len(graph.groups), max(group.size for group in graph.groups)))
  return {group.name: padded[k, : group.size] for k, group in enumerate(graph.groups)}


def sample_masks(key: jax.Array, outputs: jax.Array, *, bias: float = 3.0, temperature: float = 0.4) -> jax.Array:
  """Draws binary masks by straight-through Gumbel-sigmoid.

      v = round(sigmoid((o + g + b) / tau)),  g ~ Gumbel(0, 1)

  The rounding is passed over in the backward pass: the gradient is that of the sigmoid.

  Args:
    key: Randomness. Use the same key on all devices, so that they agree on the masks.
    outputs: o, of any shape.
    bias: b; a positive one makes pruning start from the whole network.
    temperature: tau.

  Returns:
    Array of 0 and 1, of the shape of `outputs`; 1 keeps.

  References:
    Gao et al., ICCV 2023, supplement A, Eq. 1.
  """
  check_key(key)
  check_array("outputs", outputs)
  outputs = jnp.asarray(outputs)
  outputs = outputs if jnp.issubdtype(outputs.dtype, jnp.floating) else outputs.astype(jnp.float32)
  check_number("bias", bias, "a number", lambda x: True, may_be_traced=True)
  check_number("temperature", temperature, "a number above 0", lambda x: x > 0, may_be_traced=True)
  soft = jax.nn.sigmoid((outputs + jax.random.gumbel(key, outputs.shape, outputs.dtype) + bias) / temperature)
  # Written so that the value is exactly 0 or 1 whatever the rounding of the difference.
  return jax.lax.stop_gradient(jnp.round(soft)) + (soft - jax.lax.stop_gradient(soft))


def keep_probability(outputs: jax.Array, *, bias: float = 3.0) -> jax.Array:
  """Returns the probability that `sample_masks` keeps a channel: P(o + g + b > 0) = 1 - exp(-exp(o + b))."""
  return -jnp.expm1(-jnp.exp(jnp.asarray(outputs) + bias))


def most_likely_masks(outputs: Logits, *, bias: float = 3.0) -> dict[str, jax.Array]:
  """Returns for each group the mask that keeps what is kept with a probability above one half.

  They are what the generator means by itself. `project_to_budget` ranks the same outputs and meets the budget exactly.
  """
  return {name: (keep_probability(o, bias=bias) > 0.5).astype(jnp.float32) for name, o in outputs.items()}
