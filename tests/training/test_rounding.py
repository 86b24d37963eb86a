"""Where the configuration leaves `prune.round_to` open, platform and network decide."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import pytest

from configs import default
from sapr_jax import models
from sapr_jax.artifacts.files import write_json
from sapr_jax.channels import trace_channels
from sapr_jax.method import check_budget, macs_budget
from sapr_jax.training import workdir
from sapr_jax.training.rounding import DEFAULT_ROUND_TO, default_round_to, resolve_round_to
from sapr_jax.training.run import _with_first_rounding


def prune_fields(**fields):
  prune = default.get_config().prune
  prune.update(fields)
  return prune


@pytest.mark.parametrize("platform", DEFAULT_ROUND_TO)
def test_the_platform_decides_for_wide_networks_only(platform):
  value = DEFAULT_ROUND_TO[platform]
  assert default_round_to(platform, 8 * value) == value
  assert default_round_to(platform, 8 * value - 1) == 1


def test_an_unknown_platform_does_not_round():
  assert default_round_to("abacus", 1024) == 1


def test_what_the_configuration_says_goes_first(tiny):
  assert resolve_round_to(prune_fields(round_to=4), tiny.graph, "gpu") == 4
  assert resolve_round_to(prune_fields(), tiny.graph, "gpu") == 1  # 4 channels in the narrowest group


@pytest.mark.parametrize(
  ("name", "rounded"), [("resnet50_imagenet", 8), ("mobilenetv2_imagenet", 8), ("resnet56_cifar10", 1)]
)
def test_the_experiments_meet_their_budget_on_a_gpu(name, rounded):
  config = importlib.import_module(f"configs.{name}").get_config()
  model, shape = models.create(config.model.name), (1, 32, 32, 3)
  graph = trace_channels(model, jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape)), shape)
  assert resolve_round_to(config.prune, graph, "gpu") == rounded
  check_budget(graph, macs_budget(graph, config.prune.p), round_to=rounded)


def test_a_budget_that_multiples_cannot_meet_is_met_without():
  model, shape = models.create("resnet18", width_multiplier=1.0), (1, 32, 32, 3)
  graph = trace_channels(model, jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape)), shape)
  assert resolve_round_to(prune_fields(p=0.5), graph, "gpu") == 8
  assert resolve_round_to(prune_fields(p=0.03), graph, "gpu") == 1


@dataclasses.dataclass(frozen=True)
class Rounded:
  """What a run has of it."""

  round_to: int


def test_a_run_that_goes_on_keeps_what_it_began_with(tmp_path):
  assert _with_first_rounding(Rounded(8), tmp_path).round_to == 8
  write_json(tmp_path / workdir.NETWORK, {"groups": {}})  # of a run that did not note it
  assert _with_first_rounding(Rounded(8), tmp_path).round_to == 8
  write_json(tmp_path / workdir.NETWORK, {"groups": {}, "round_to": 1})
  assert _with_first_rounding(Rounded(8), tmp_path).round_to == 1
