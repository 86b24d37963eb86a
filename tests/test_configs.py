"""The configurations hold the numbers of the paper."""

from __future__ import annotations

import importlib
import pathlib

import pytest

from configs import resnet56_cifar10
from sapr_jax.training.checks import check_config
from sapr_jax.training.schedules import learning_rate_schedule

CONFIGS = sorted(file.stem for file in (pathlib.Path(__file__).parent.parent / "configs").glob("[!_]*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_valid_and_locked_against_misspelling(name):
  config = importlib.import_module(f"configs.{name}").get_config()
  check_config(config)
  with pytest.raises(AttributeError, match="epoch"):
    config.train.epoch = 3


def test_resnet56_has_the_numbers_of_supplement_a_and_table_1():
  config = resnet56_cifar10.get_config()
  assert (config.model.name, config.data.source, config.data.name) == ("resnet56", "tfds", "cifar10")
  assert (config.prune.p, config.prune.start_epoch) == (0.48, 40)
  assert (config.generator.temperature, config.generator.bias, config.generator.data_share) == (0.4, 3.0, 0.1)
  for phase, epochs in ((config.train, 200), (config.finetune, 160)):
    assert (phase.epochs, phase.batch_size, phase.momentum, phase.weight_decay) == (epochs, 128, 0.9, 1e-4)
  per_epoch = 390
  train, finetune = (learning_rate_schedule(p, per_epoch) for p in (config.train, config.finetune))
  rates = [float(train(epoch * per_epoch)) for epoch in (0, 99, 100, 149, 150, 199)]
  assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
  rates = [float(finetune(epoch * per_epoch)) for epoch in (0, 79, 80, 119, 120, 159)]
  assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_the_cosine_schedule_ends_at_zero():
  config = resnet56_cifar10.get_config()
  config.train.schedule, config.train.epochs = "cosine", 10
  schedule = learning_rate_schedule(config.train, 5)
  assert [float(schedule(step)) for step in (0, 25, 50)] == pytest.approx([0.1, 0.05, 0.0], abs=1e-8)
