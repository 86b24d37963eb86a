"""Platform and network decide which multiples widths are of, where the caller leaves it open."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from sapr_jax import models
from sapr_jax.channels import trace_channels
from sapr_jax.method import check_budget, default_round_to, macs_budget
from sapr_jax.method.rounding import DEFAULT_ROUND_TO


def traced(name, **fields):
  model, shape = models.create(name, **fields), (1, 32, 32, 3)
  return trace_channels(model, jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape)), shape)


@pytest.fixture(scope="module")
def wide():
  return traced("resnet18")


@pytest.mark.parametrize("platform", DEFAULT_ROUND_TO)
def test_wide_networks_are_rounded_and_narrow_ones_are_not(wide, tiny, platform):
  assert default_round_to(wide, macs_budget(wide, 0.5), platform) == DEFAULT_ROUND_TO[platform]
  assert default_round_to(tiny.graph, macs_budget(tiny.graph, 0.48), platform) == 1


def test_an_unknown_platform_does_not_round(wide):
  assert default_round_to(wide, macs_budget(wide, 0.5), "abacus") == 1


def test_a_budget_that_multiples_cannot_meet_is_met_without(wide):
  assert default_round_to(wide, macs_budget(wide, 0.03), "gpu") == 1


@pytest.mark.parametrize(
  ("name", "rounded"),
  [
    pytest.param("resnet50_imagenet", 8, marks=pytest.mark.slow),
    pytest.param("mobilenetv2_imagenet", 8, marks=pytest.mark.slow),
    ("resnet56_cifar10", 1),
  ],
)
def test_the_experiments_meet_their_budget_on_a_gpu(name, rounded):
  config = importlib.import_module(f"sapr_jax.configs.{name}").get_config()
  graph = traced(config.model.name)
  budget = macs_budget(graph, config.prune.p)
  assert default_round_to(graph, budget, "gpu") == rounded
  check_budget(graph, budget, round_to=rounded)
