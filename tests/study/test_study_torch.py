"""The alternatives in PyTorch: the same network, budget, weight decay and augmentation as ours."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapr_jax as sapr
from sapr_jax.configs import default
from sapr_jax.training import optimizers

torch = pytest.importorskip("torch", reason="the alternatives in PyTorch need pip install 'sapr_jax[bench]'")
pytest.importorskip("torch_pruning", reason="the alternatives in PyTorch need pip install 'sapr_jax[bench]'")

from benchmarks.torch_networks import count_macs  # noqa: E402
from study import torch_choice, torch_runs  # noqa: E402
from study.ours import budget_macs  # noqa: E402


@pytest.mark.slow
def test_pytorch_networks_cost_what_ours_do_and_are_cut_within_the_budget():
  ours = sapr.models.create("resnet8", width_multiplier=0.5)
  variables = ours.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  model, image = torch_runs.make_network(ours, variables), torch.randn(1, 3, 32, 32)
  np.testing.assert_allclose(
    model.eval()(image).detach().numpy(),
    ours.apply(variables, jnp.asarray(image.permute(0, 2, 3, 1).numpy())),
    rtol=1e-4,
    atol=1e-5,
  )
  macs = sapr.trace_channels(ours, variables, (1, 32, 32, 3)).macs()
  assert count_macs(model, (3, 32, 32)) == macs
  pruner = torch_runs.make_pruner(model, image, reg=0.0)
  pruner.current_step = 100
  while count_macs(model, (3, 32, 32)) > 0.5 * macs:
    pruner.step()
  assert count_macs(model, (3, 32, 32)) > 0.4 * macs
  widths = {n: m.weight.shape[0] for n, m in model.named_modules() if n.endswith(("conv1", "conv2"))}
  assert [widths[f"layer{stage}.0.conv2"] for stage in (1, 2, 3)] == [8, 16, 32]
  assert widths["conv1"] == 8 and sum(widths[f"layer{stage}.0.conv1"] for stage in (1, 2, 3)) < 8 + 16 + 32
  assert model(image).shape == (1, 10)


def test_sparse_learning_takes_off_as_much_as_the_recipe_does():
  recipe = 390 * (60 * 0.01 + 20 * 0.001 + 20 * 0.0001)
  assert torch_runs.scaled_reg(1.0, recipe) == pytest.approx(5e-4)
  assert torch_runs.scaled_reg(0.0, 0.0) == 0.0  # a network that is cut at once
  assert torch_runs.scaled_reg(2.0, recipe / 10) == pytest.approx(1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["all", "kernels", "convolutions"])
def test_weight_decay_shrinks_in_pytorch_what_it_shrinks_here(of):
  ours = sapr.models.create("resnet8", width_multiplier=0.5)
  variables = ours.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  phase = default.phase()
  phase.weight_decay, phase.weight_decay_of = 1.0, of
  groups = torch_runs.decay_groups(torch_runs.make_network(ours, variables), phase)
  # Without a gradient, a step of rate 1 and decay 1 takes away all that is decayed.
  phase.momentum = 0.0
  tx = optimizers.sgd(phase, lambda step: 1.0)
  params = variables["params"]
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  decayed = sum(float((w.detach() ** 2).sum()) for group in groups if group["weight_decay"] for w in group["params"])
  assert decayed == pytest.approx(sum(float((u**2).sum()) for u in jax.tree.leaves(updates)), rel=1e-4)
  assert sum(w.numel() for group in groups for w in group["params"]) == sum(w.size for w in jax.tree.leaves(params))


def test_a_torch_crop_is_a_window_of_the_padded_image():
  images = torch.arange(1, 2 * 4 * 4 + 1, dtype=torch.uint8).reshape(2, 4, 4, 1)
  found = torch_runs.augment(images, torch.Generator().manual_seed(0), padding=1, flip=True)
  padded = torch.nn.functional.pad(images, (0, 0, 1, 1, 1, 1))
  for image, whole in zip(found, padded, strict=True):
    windows = [whole[y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
    assert any(torch.equal(image, other) for window in windows for other in (window, window.flip(1)))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "width"), [("resnet8", 0.5), ("mobilenetv2_cifar", 0.25)], ids=["resnet", "mobilenetv2"]
)
def test_the_channels_that_torch_pruning_keeps_make_the_network_that_it_leaves(name, width):
  shape, p = (1, 32, 32, 3), 0.5
  ours = sapr.models.create(name, num_classes=10, width_multiplier=width)
  variables = ours.init(jax.random.key(0), jnp.zeros(shape))
  graph = sapr.trace_channels(ours, variables, shape)
  masks = torch_choice.kept_by_group_norm(ours, variables, graph, shape, p)
  budget = sapr.macs_budget(graph, p)
  assert 0.97 * budget.limit < graph.prunable_macs(masks) <= budget.limit
  projected = sapr.project_to_budget(graph, masks, budget, round_to=1)
  assert all((projected[group] >= mask).all() for group, mask in masks.items())  # as a run takes them
  theirs, image = torch_runs.make_network(ours, variables), torch.randn(1, 3, 32, 32)
  torch_runs.cut(torch_runs.make_pruner(theirs, image, 0.0), theirs, image, budget_macs(graph, p))
  small, small_variables = sapr.prune(ours, variables, graph, masks)
  np.testing.assert_allclose(
    small.apply(small_variables, jnp.asarray(image.permute(0, 2, 3, 1).numpy())),
    theirs.eval()(image).detach().numpy(),
    rtol=1e-3,
    atol=1e-4,
  )
