"""Masking and cutting: worked cases, then laws on random masks and random statistics."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import laws
import networks
import numpy as np
import optax
import pytest

from sapr_jax import models
from sapr_jax.channels import Call, ChannelGraph, NarrowModule, mask_params, prune, prune_tree, trace_channels
from sapr_jax.errors import InputError


@pytest.fixture(scope="module")
def resnet():
  """A residual network with random variables in float32, its graph, masks, and what was cut with them."""
  model = models.create("resnet8", width_multiplier=0.25)
  variables = laws.random_variables(model, 3, np.float32)
  graph = trace_channels(model, variables, laws.SHAPE)
  masks = laws.random_masks(graph, 0)
  small, small_variables = prune(model, variables, graph, masks)
  return model, variables, graph, masks, small, small_variables


def test_two_channels_by_hand():
  model = networks.TwoDense()
  params = {
    "up": {"kernel": np.array([[1, 2], [3, 4]], np.float32), "bias": np.array([5, 6], np.float32)},
    "down": {"kernel": np.array([[10], [100]], np.float32)},
  }
  graph = trace_channels(model, {"params": params}, (1, 2), select="unjoined")
  masks = {"up": np.array([0.0, 1.0])}
  masked = mask_params(params, graph, masks)
  np.testing.assert_array_equal(masked["down"]["kernel"], [[0], [100]])
  assert masked["up"]["kernel"] is params["up"]["kernel"]
  small, small_variables = prune(model, {"params": params}, graph, masks)
  np.testing.assert_array_equal(small_variables["params"]["up"]["kernel"], [[2], [4]])
  np.testing.assert_array_equal(small_variables["params"]["up"]["bias"], [6])
  np.testing.assert_array_equal(small_variables["params"]["down"]["kernel"], [[100]])
  assert small.widths == (("up", (("features", 1),)),)
  # relu(1 * 2 + 1 * 4 + 6) * 100
  assert float(small.apply(small_variables, np.ones((1, 2), np.float32))[0, 0]) == 1200


def features_of(model):
  """Returns a function that gives the feature maps of all layers inside the blocks but the gated ones."""

  def is_chosen(module, name):
    return module.name is not None and module.name.startswith(("stage", "conv2", "bn2"))

  def features(variables, images):
    return model.apply(variables, images, capture_intermediates=is_chosen, mutable=["intermediates"])[1]

  return features


def test_masked_is_pruned_in_float64():
  model = models.create("resnet8", width_multiplier=0.25, dtype=np.float64)
  with jax.enable_x64(True):
    # The logits are rounded to float32 at the end, so look at the feature maps.
    variables = laws.random_variables(model, 0)
    graph = trace_channels(model, variables, laws.SHAPE, input_dtype=np.float64)
    masks = laws.random_masks(graph, 0)
    small, small_variables = prune(model, variables, graph, masks)
    images = laws.random_images(0)
    masked = {**variables, "params": mask_params(variables["params"], graph, masks)}
    want, got = (jax.jit(features_of(net))(v, images) for net, v in ((model, masked), (small, small_variables)))
  assert {leaf.dtype for leaf in jax.tree.leaves(want)} == {np.dtype(np.float64)}
  assert laws.relative_error(got, want) < 1e-10


def test_masked_is_pruned_in_float32(resnet):
  model, variables, graph, masks, *_ = resnet
  laws.check_masked_is_pruned(model, graph, variables, masks, 1e-4, np.float32)


def test_masks_of_ones_change_nothing(resnet):
  model, variables, graph, *_ = resnet
  masked = mask_params(variables["params"], graph, graph.full_masks())
  jax.tree.map(np.testing.assert_array_equal, masked, variables["params"])
  small, small_variables = prune(model, variables, graph, graph.full_masks())
  assert small.widths == ()
  jax.tree.map(np.testing.assert_array_equal, small_variables, variables)


def test_nothing_in_the_arguments_is_changed(resnet):
  model, variables, graph, masks, *_ = resnet
  variables, masks = jax.tree.map(np.array, (variables, masks))
  before = copy.deepcopy((variables, masks))
  mask_params(variables["params"], graph, masks)
  prune(model, variables, graph, masks)
  prune_tree(variables, graph, masks)
  jax.tree.map(np.testing.assert_array_equal, (variables, masks), before)


def test_variables_that_do_not_fit_are_refused(resnet):
  model, variables, graph, masks, *_ = resnet
  with pytest.raises(InputError, match=r"variables lacks batch_stats/.*; it must hold all collections"):
    prune(model, {"params": variables["params"]}, graph, masks)
  other = {**variables, "params": {**variables["params"], "fc": {"kernel": jnp.zeros((3, 10)), "bias": jnp.zeros(10)}}}
  with pytest.raises(InputError, match=r"variables: params/fc/kernel must have shape .*, got \(3, 10\)"):
    prune(model, other, graph, masks)


def test_the_small_model_is_an_ordinary_module(resnet):
  _, _, _, masks, small, small_variables = resnet
  fresh = jax.eval_shape(small.init, jax.random.key(1), jax.ShapeDtypeStruct(laws.SHAPE, jnp.float32))
  assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, small_variables)
  kept = int(masks["stage2_block1/conv1"].sum())
  assert kept < 8
  assert small_variables["batch_stats"]["stage2_block1"]["bn1"]["mean"].shape == (kept,)

  def loss(params):
    logits, updates = small.apply(
      {**small_variables, "params": params}, laws.random_images(0, np.float32), train=True, mutable=["batch_stats"]
    )
    return jnp.sum(logits**2), updates

  gradient, updates = jax.jit(jax.grad(loss, has_aux=True))(small_variables["params"])
  assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, small_variables["params"])
  assert jax.tree.map(jnp.shape, updates["batch_stats"]) == jax.tree.map(jnp.shape, small_variables["batch_stats"])
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
  before, after = (tree["batch_stats"]["stage2_block1"]["bn1"]["mean"] for tree in (small_variables, updates))
  assert not np.array_equal(before, after)


def test_the_small_model_runs_inside_another_module(resnet):
  _, _, _, _, small, small_variables = resnet
  images = laws.random_images(0, np.float32)

  class Around(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x):
      return 2 * self.inner(x)

  nested = {collection: {"inner": tree} for collection, tree in small_variables.items()}
  got = Around(small).apply(nested, images)
  np.testing.assert_allclose(got, 2 * small.apply(small_variables, images), rtol=1e-5)


def test_pruning_twice_is_pruning_once(resnet):
  model, variables, graph, *_ = resnet
  first = {name: np.arange(mask.size) % 4 != 0 for name, mask in graph.full_masks().items()}
  middle, middle_variables = prune(model, variables, graph, first)
  middle_graph = trace_channels(middle, middle_variables, laws.SHAPE)
  assert [group.name for group in middle_graph.groups] == [group.name for group in graph.groups]
  second = laws.random_masks(middle_graph, 5)
  small, small_variables = prune(middle, middle_variables, middle_graph, second)
  both = {}
  for name, mask in first.items():
    both[name] = mask.astype(float)
    both[name][mask] = second[name]
  once, once_variables = prune(model, variables, graph, both)
  assert small == once
  jax.tree.map(np.testing.assert_array_equal, small_variables, once_variables)
  assert isinstance(small.base, models.CifarResNet)


def test_optimizer_states_are_cut_with_the_parameters(resnet):
  _, variables, graph, masks, _, small_variables = resnet
  tx = optax.chain(optax.clip(1.0), optax.trace(0.9), optax.scale_by_adam(), optax.add_decayed_weights(1e-4))
  state = tx.init(variables["params"])
  # Each moment holds the parameters themselves, so that it must come out as the small parameters.
  state = jax.tree.map(lambda leaf: leaf, state)
  state = (state[0], state[1]._replace(trace=variables["params"]), state[2]._replace(mu=variables["params"]), state[3])
  cut = prune_tree(state, graph, masks)
  want = tx.init(small_variables["params"])
  assert jax.tree.structure(cut) == jax.tree.structure(want)
  assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, want)
  jax.tree.map(np.testing.assert_array_equal, cut[1].trace, small_variables["params"])
  jax.tree.map(np.testing.assert_array_equal, cut[2].mu, small_variables["params"])
  assert cut[2].count is state[2].count


def test_trees_of_other_arrays_are_left_alone(resnet):
  _, variables, graph, masks, _, small_variables = resnet
  tree = {
    "ema": [variables],
    "statistics": variables["batch_stats"],
    "rng": jnp.arange(8),
    "stage2_block1": {"conv1": {"kernel": jnp.zeros((1,))}},
    "conv": {"kernel": jnp.zeros((2, 2))},
    "none": None,
  }
  cut = prune_tree(tree, graph, masks)
  jax.tree.map(np.testing.assert_array_equal, cut["ema"][0], small_variables)
  jax.tree.map(np.testing.assert_array_equal, cut["statistics"], small_variables["batch_stats"])
  assert cut["rng"] is tree["rng"]
  assert cut["stage2_block1"]["conv1"]["kernel"] is tree["stage2_block1"]["conv1"]["kernel"]
  assert cut["conv"]["kernel"] is tree["conv"]["kernel"]  # that layer is not cut
  assert cut["ema"][0]["params"]["conv"]["kernel"] is variables["params"]["conv"]["kernel"]


@pytest.mark.parametrize(
  ("make", "names"),
  [
    (
      lambda: optax.adafactor(1e-3, min_dim_size_to_factor=2),
      r"\.v_row.*'conv1'.* \(3, 3, 4\) seems to belong to params/.*\(and 7 more\)",
    ),
    (lambda: optax.sm3(1e-3), r"\.mu\['\w+'\]\['conv1'\]\['kernel'\]\[0\] of shape \(3,\) seems to belong"),
    (lambda: optax.flatten(optax.adam(1e-3)), r"\.mu of shape \(\d+,\) seems to hold all parameters in one array"),
  ],
)
def test_optimizer_states_of_another_form_than_the_parameters_are_refused(resnet, make, names):
  _, variables, graph, masks, *_ = resnet
  state = make().init(variables["params"])
  with pytest.raises(InputError, match=f"^tree{'.*'}{names}"):
    prune_tree(state, graph, masks)
  jax.tree.map(np.testing.assert_array_equal, prune_tree(state, graph, graph.full_masks()), state)


def test_optimizer_states_with_one_number_for_a_parameter_are_cut(resnet):
  _, variables, graph, masks, _, small_variables = resnet
  for tx in (optax.novograd(1e-3), optax.adafactor(1e-3, min_dim_size_to_factor=10**6)):
    cut = prune_tree(tx.init(variables["params"]), graph, masks)
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, tx.init(small_variables["params"]))


class Names(nn.Module):
  """A layer in a sub-module has the name and the shape of one that is cut at the top."""

  @nn.compact
  def __call__(self, x):
    class Inner(nn.Module):
      @nn.compact
      def __call__(self, x):
        return nn.Dense(3, name="conv")(x)

    x = nn.tanh(nn.Dense(3, name="conv")(x))
    return Inner(name="block")(x)


def test_a_path_that_ends_like_another_is_another():
  model = Names()
  variables = laws.random_variables(model, 0, np.float32, (1, 3))
  graph = trace_channels(model, variables, (1, 3), select="unjoined")
  small_variables = prune_tree(variables, graph, {"conv": np.array([1, 0, 1])})
  assert jax.tree.map(jnp.shape, small_variables["params"]) == {
    "conv": {"bias": (2,), "kernel": (3, 2)},
    "block": {"conv": {"bias": (3,), "kernel": (2, 3)}},
  }


def test_bad_masks_are_refused(resnet):
  model, variables, graph, masks, *_ = resnet
  name = graph.groups[0].name
  for bad, text in (
    (np.zeros(4), "drops all 4 channels"),
    (np.full(4, 0.5), "only 0"),
    (np.ones(3), "must have shape"),
  ):
    for call in (lambda m: prune(model, variables, graph, m), lambda m: prune_tree(variables, graph, m)):
      with pytest.raises(InputError, match=f"group '{name}' .*{text}"):
        call({**masks, name: bad})
  with pytest.raises(InputError, match="masks misses the group"):
    mask_params(variables["params"], graph, {})


def test_widths_are_all_that_defines_a_small_model(resnet):
  model, _, _, _, small, small_variables = resnet
  again = NarrowModule(models.create("resnet8", width_multiplier=0.25), small.widths)
  assert again == small
  images = laws.random_images(0, np.float32)
  np.testing.assert_array_equal(again.apply(small_variables, images), small.apply(small_variables, images))
  assert model.width_multiplier == 0.25


@pytest.fixture(scope="module")
def concatenated():
  """A network whose members are not all whole axes, with masks."""
  model = networks.DenseNet()
  variables = laws.random_variables(model, 0, np.float32)
  graph = trace_channels(model, variables, laws.SHAPE, select="exact")
  return model, variables, graph, laws.random_masks(graph, 0)


WAYS = {
  "pickle": lambda graph: pickle.loads(pickle.dumps(graph)),
  "JSON": lambda graph: ChannelGraph.from_json(json.loads(json.dumps(graph.to_json()))),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_stored_graph_prunes_like_the_first(concatenated, way):
  model, variables, graph, masks = concatenated
  stored = WAYS[way](graph)
  assert stored.to_json() == graph.to_json()
  assert str(stored) == str(graph) and stored.explain() == graph.explain()
  assert (stored.layers, stored.shapes, stored.call) == (graph.layers, graph.shapes, graph.call)
  assert (stored.macs(masks), stored.num_params(masks)) == (graph.macs(masks), graph.num_params(masks))
  small, small_variables = prune(model, variables, stored, masks)
  want, want_variables = prune(model, variables, graph, masks)
  assert small == want
  jax.tree.map(np.testing.assert_array_equal, small_variables, want_variables)


def test_only_json_values_can_be_written(resnet):
  graph = dataclasses.replace(resnet[2], call=Call((), {"train": False, "noise": {1, 2}}))
  with pytest.raises(InputError, match="noise must be of arrays and JSON values to be written, got a set"):
    graph.to_json()
  with pytest.raises(
    InputError, match=r"must be what ChannelGraph\.to_json returned; reading it gave KeyError: 'groups'"
  ):
    ChannelGraph.from_json({})


def test_the_graph_of_another_model_is_refused():
  """The variables are the same, but the code of the second model sums over the channels."""
  model, other = networks.Between(jnp.tanh), networks.Between(nn.softmax)
  variables = laws.random_variables(model, 0, np.float32)
  graph = trace_channels(model, variables, laws.SHAPE, select="exact")
  prune(model, variables, graph, laws.random_masks(graph, 0))
  with pytest.raises(InputError, match="graph must be of this model, which has no such group 'conv1'") as info:
    prune(other, variables, graph, laws.random_masks(graph, 0))
  assert "\n" not in str(info.value)
