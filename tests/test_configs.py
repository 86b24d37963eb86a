"""The configurations hold the numbers of the paper."""

from __future__ import annotations

import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import sapr_jax as sapr
from sapr_jax import configs, main, models
from sapr_jax.channels import trace_channels
from sapr_jax.configs import resnet56_cifar10
from sapr_jax.training.config import check_config
from sapr_jax.training.optimizers import learning_rate_schedule

CONFIGS = sorted(file.stem for file in (pathlib.Path(__file__).parent.parent / "configs").glob("[!_]*.py"))

# Supplement A and Table 1: p, E_start, epochs of training and fine-tuning; then the share of all MACs that is left.
EXPERIMENTS = {
  "resnet56_cifar10": ("resnet56", 0.48, 40, 200, 160, 0.482),
  "mobilenetv2_cifar10": ("mobilenetv2_cifar", 0.54, 40, 200, 160, 0.583),
  "resnet34_imagenet": ("resnet34", 0.54, 18, 90, 100, 0.557),
  "resnet50_imagenet": ("resnet50", 0.37, 18, 90, 100, 0.444),
  "resnet101_imagenet": ("resnet101", 0.41, 18, 90, 100, 0.446),
  "mobilenetv2_imagenet": ("mobilenetv2", 0.65, 30, 150, 100, 0.699),
}
CIFAR_RATES = (
  {0: 0.1, 99: 0.1, 100: 0.01, 149: 0.01, 150: 0.001, 199: 0.001},
  {0: 0.1, 79: 0.1, 80: 0.01, 119: 0.01, 120: 0.001, 159: 0.001},
)
RESNET_RATES = (
  {0: 0.1, 29: 0.1, 30: 0.01, 59: 0.01, 60: 0.001, 89: 0.001},
  {0: 0.1, 29: 0.1, 30: 0.01, 59: 0.01, 60: 0.001, 89: 0.001, 90: 0.0001, 99: 0.0001},
)
COSINE_RATES = ({0: 0.045, 75: 0.0225, 150: 0.0}, {0: 0.045, 50: 0.0225, 100: 0.0})


def config_of(name):
  return importlib.import_module(f"sapr_jax.configs.{name}").get_config()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_valid_and_locked_against_misspelling(name):
  config = config_of(name)
  check_config(config)
  with pytest.raises(AttributeError, match="epoch"):
    config.train.epoch = 3


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_numbers_of_supplement_a_and_table_1(name):
  config = config_of(name)
  model, p, start_epoch, train_epochs, finetune_epochs, _ = EXPERIMENTS[name]
  assert config.model.name == model
  assert (config.prune.p, config.prune.start_epoch) == (p, start_epoch)
  assert (config.train.epochs, config.finetune.epochs) == (train_epochs, finetune_epochs)
  assert (config.generator.temperature, config.generator.bias, config.generator.data_share) == (0.4, 3.0, 0.1)
  is_imagenet = name.endswith("imagenet")
  for phase in (config.train, config.finetune):
    assert phase.batch_size == (256 if is_imagenet else 128)
    assert (phase.momentum, phase.weight_decay) == (0.9, 4e-5 if name == "mobilenetv2_imagenet" else 1e-4)
  assert (config.data.source, config.data.name) == ("tfds", "imagenet2012" if is_imagenet else "cifar10")
  assert config.data.stream == is_imagenet


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_learning_rates_of_supplement_a(name):
  config = config_of(name)
  rates = CIFAR_RATES if "cifar" in name else COSINE_RATES if name.startswith("mobilenet") else RESNET_RATES
  for phase, expected in zip((config.train, config.finetune), rates, strict=True):
    schedule = learning_rate_schedule(phase, 10)
    assert {epoch: float(schedule(10 * epoch)) for epoch in expected} == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=pytest.mark.slow if name.endswith("imagenet") else ()) for name in EXPERIMENTS]
)
def test_the_docstring_has_the_command_and_the_size(name):
  module = importlib.import_module(f"sapr_jax.configs.{name}")
  page = module.__doc__
  assert f"python -m sapr_jax.main --config configs/{name}.py --workdir runs/" in page
  assert "Sized for" in page
  model, p, *_, share = EXPERIMENTS[name]
  side = 32 if "cifar" in name else 224
  network = models.create(model)
  shape = (1, side, side, 3)
  graph = trace_channels(
    network, jax.eval_shape(network.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32)), shape
  )
  left = (graph.macs() - (1 - p) * graph.prunable_macs()) / graph.macs()
  assert left == pytest.approx(share, abs=5e-4)
  assert f"{left:.1%}".replace("%", " %") in page
  millions = graph.macs() / 1e6
  assert any(re.search(rf"\b{re.escape(text)}\s+M\s+MACs", page) for text in (f"{millions:,.0f}", f"{millions:,.1f}"))


def test_every_experiment_says_what_it_is_and_how_long_it_takes():
  assert configs.names() == [name for name in CONFIGS if not name.startswith("default")]
  rows = configs.table().splitlines()
  assert [row.split()[0] for row in rows] == configs.names()
  for row in rows:
    assert re.fullmatch(r"\w+ +[^()]+ \((about .+ CPU cores.*|not measured; computed, .+ 8 A100)\)", row), row


def test_an_experiment_by_its_name_prints_as_the_command_line_takes_it():
  config = configs.get("resnet56_cifar10")
  lines = str(config).splitlines()
  assert {"prune.p = 0.48", "train.decay_epochs = (100, 150)", "data.path = None", "model.name = 'resnet56'"} <= {
    *lines
  }
  assert len(lines) == len({line.split(" = ")[0] for line in lines}) > 80
  with pytest.raises(
    sapr.InputError, match=r"an experiment must be one of digits, .*, resnet56_cifar10, .*got 'resnet57'"
  ):
    configs.get("resnet57")


@pytest.mark.parametrize(
  ("value", "found"),
  [
    ("digits", "digits"),
    ("configs/digits.py", "digits"),
    ("default", "default"),
    ("own/mine.py", None),
    ("a/digits", None),
  ],
)
def test_the_command_finds_experiments_by_name_from_any_folder(value, found, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  expected = pathlib.Path(configs.__file__).parent / f"{found}.py" if found else value
  assert main._config_file(value) == str(expected)


def test_a_file_of_ones_own_comes_before_that_of_the_package(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "digits.py").touch()
  assert main._config_file("configs/digits.py") == "configs/digits.py"


def test_the_cosine_schedule_ends_at_zero():
  config = resnet56_cifar10.get_config()
  config.train.schedule, config.train.epochs = "cosine", 10
  schedule = learning_rate_schedule(config.train, 5)
  assert [float(schedule(step)) for step in (0, 25, 50)] == pytest.approx([0.1, 0.05, 0.0], abs=1e-8)
