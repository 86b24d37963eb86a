"""Networks that take other things than one array of images."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapr_jax as sapr
from sapr_jax.channels.call import Call, call_of
from sapr_jax.errors import InputError
from tests.channels.laws import random_masks, relative_error


class Pair(NamedTuple):
  left: Any
  right: Any


@flax.struct.dataclass
class Batch:
  tokens: Any
  weights: Any


class TwoTowers(nn.Module):
  """Scores of pairs: one tower reads tokens, the other one numbers; the third argument scales."""

  @nn.compact
  def __call__(self, tokens, numbers, *, scale, noise=None):
    a = nn.Dense(5, name="a2")(nn.elu(nn.Dense(6, name="a1")(nn.Embed(7, 4, name="embed")(tokens)))).mean(1)
    b = nn.Dense(5, name="b2")(nn.elu(nn.Dense(4, name="b1")(numbers)))
    if noise is not None:
      b = b + jax.random.normal(self.make_rng("noise"), b.shape) * noise
    return {"scores": a @ b.T * scale["by"]}


class Nested(nn.Module):
  """Takes a named tuple, a dataclass or a dictionary of arrays, without an axis of the batch."""

  @nn.compact
  def __call__(self, inputs):
    x = jnp.concatenate(jax.tree.leaves(inputs), -1)
    return nn.Dense(2, name="down")(jnp.tanh(nn.Dense(4, name="up")(x)))


TOKENS = np.array([[1, 2, 0], [3, 6, 5]])


def check_law(model, args, kwargs, select="unjoined"):
  with jax.enable_x64(True):
    args, kwargs = jax.tree.map(jnp.asarray, (args, kwargs))
    with jax.numpy_dtype_promotion("standard"):  # flax draws float32 parameters
      drawn = model.init(jax.random.key(0), *args, **kwargs)
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), drawn)
    graph = sapr.trace_channels(model, variables, *args, select=select, **kwargs)
    masks = random_masks(graph, 3)
    small, small_variables = sapr.prune(model, variables, graph, masks)
    masked = {**variables, "params": sapr.mask_params(variables["params"], graph, masks)}
    assert relative_error(small.apply(small_variables, *args, **kwargs), model.apply(masked, *args, **kwargs)) < 1e-10
    assert graph.macs(masks) == sapr.count_macs(small, small_variables, *args, **kwargs) < graph.macs()
    return graph, masks


def test_several_arrays_and_keywords():
  graph, masks = check_law(TwoTowers(), (TOKENS, np.ones((3, 2))), {"scale": {"by": np.full((), 2.0)}})
  assert [group.name for group in graph.groups] == ["a1", "b1"]
  # 2 x 3 tokens and 3 vectors; the embedding is no product; then 2 x 3 scores of five numbers.
  assert graph.macs() == 6 * (4 * 6 + 6 * 5) + 3 * (2 * 4 + 4 * 5) + 2 * 3 * 5
  again = sapr.ChannelGraph.from_json(graph.to_json())
  assert again.call == graph.call and again.macs(masks) == graph.macs(masks)


@pytest.mark.parametrize("kind", [Pair, Batch, lambda a, b: {"a": a, "b": [b]}], ids=["tuple", "struct", "dict"])
def test_trees_without_a_batch(kind):
  graph, _ = check_law(Nested(), (kind(np.ones(3), np.ones(2)),), {})
  assert graph.macs() == 5 * 4 + 4 * 2


def test_random_keys_are_arguments():
  model, args, scale = TwoTowers(), (TOKENS, np.ones((3, 2))), {"by": jnp.ones(())}
  rngs = {"noise": jax.random.key(1)}
  variables = model.init({"params": jax.random.key(0), **rngs}, *args, scale=scale, noise=0.5)
  graph = sapr.trace_channels(model, variables, *args, scale=scale, noise=0.5, rngs=rngs, select="unjoined")
  assert [group.name for group in graph.groups] == ["a1", "b1"]
  with pytest.raises(InputError, match="to be written"):
    graph.to_json()


def test_shapes_are_enough():
  model = TwoTowers()
  call = (jax.ShapeDtypeStruct((2, 3), jnp.int32), jax.ShapeDtypeStruct((3, 2), jnp.float32))
  scale = {"by": jax.ShapeDtypeStruct((), jnp.float32)}
  variables = jax.eval_shape(model.init, jax.random.key(0), *call, scale=scale)
  assert sapr.trace_channels(model, variables, *call, scale=scale, select="unjoined").macs() == 438


def test_a_missing_argument_is_named():
  variables = Nested().init(jax.random.key(0), {"a": jnp.ones(3)})
  with pytest.raises(InputError, match=r"missing 1 required keyword-only argument: 'scale'. Pass these arguments too"):
    sapr.trace_channels(TwoTowers(), variables, TOKENS, np.ones((3, 2)))
  with pytest.raises(InputError, match=r"inputs of the model must be arrays .*, got None"):
    sapr.trace_channels(Nested(), variables, None)
  with pytest.raises(InputError, match=r"input_shape must be given once, got \(1, 3\) and \(1, 4\)"):
    sapr.trace_channels(Nested(), variables, (1, 3), input_shape=(1, 4))


def test_a_call_is_written_and_read():
  call = call_of((np.ones((1, 2), np.float32), [1, "a"]), {"mask": None, "x": (jnp.ones(3, jnp.bfloat16), {"b": True})})
  assert Call.from_json(call.to_json()) == call
  assert str(call) == "float32[1,2], [1, a], mask=None, x=(bfloat16[3], {b: True})"
  assert call.filled([1, 2]) == ((1, [1, "a"]), {"mask": None, "x": (2, {"b": True})})
