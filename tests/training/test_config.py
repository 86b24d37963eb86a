"""The table of fields: every field has its rule, and every rule its field."""

from __future__ import annotations

import re

import pytest
from ml_collections import ConfigDict

import sapr_jax as sapr
from sapr_jax.configs import default
from sapr_jax.method import COSTS
from sapr_jax.training.config import FIELDS, check_config
from sapr_jax.training.workdir import flat_fields


def test_no_field_lacks_a_rule_and_no_rule_a_field():
  assert set(FIELDS) == set(flat_fields(default.get_config()))


def test_the_default_configuration_follows_every_rule():
  check_config(default.get_config())


@pytest.mark.parametrize("name", FIELDS)
def test_every_rule_refuses_something_and_says_what_must_be(name):
  config = default.get_config()
  with config.ignore_type():
    config.update_from_flattened_dict({name: object()})
  with pytest.raises(sapr.InputError, match=rf"{name} must be .+, got <object") as info:
    check_config(config)
  assert "\n" not in str(info.value)


NAN, INF = float("nan"), float("inf")
REFUSED = {
  "seed": (-1, 2**32, None, 1.0),
  "steps_per_call": (0,),
  "eval_batch_size": (0,),
  "model.name": ("resnet57", 8),
  "model.dtype": ("float8",),
  "model.width_multiplier": (0.0, 1e9),
  "data.source": ("web",),
  "data.name": (10,),
  "data.path": ("", "a\0b"),
  "data.train_images": (0,),
  "data.test_images": (-1,),
  "data.validation_images": (0,),
  "data.crop_padding": (-1, 10**6),
  "data.skip_broken": (-1, True),
  "data.changed_ok": (1,),
  "data.flip": ("yes",),
  "data.workers": (-1,),
  "data.mean": (("a",), 0.5, (-0.1,), ()),
  "data.std": ((2.0,), (NAN,)),
  "train.epochs": (-1, 1.5, True, 10**20),
  "train.batch_size": (0,),
  "train.accumulate": (0,),
  "train.base_batch_size": (0,),
  "train.warmup_epochs": (-1.0,),
  "train.learning_rate": (0.0, NAN, INF, "0.1"),
  "train.schedule": ("linear",),
  "train.decay_epochs": ((1, 2.5), (True,), 20, (-1,)),
  "train.decay_factor": (0.0,),
  "train.momentum": (1.0, -0.1),
  "train.nesterov": (1,),
  "train.weight_decay": (-1.0,),
  "train.weight_decay_of": ("bias",),
  "finetune.epochs": (-1,),
  "prune.proposer": ("oracle",),
  "prune.cost": ("seconds",),
  "prune.latency_table": ("", 3),
  "prune.latency_batch_size": (0,),
  "prune.p": (0.0, 1.01, NAN, None),
  "prune.limit": (0.0,),
  "prune.gamma": (-1e-3,),
  "prune.shrinkage": (-1.0,),
  "train.distillation.weight": (1.5,),
  "finetune.distillation.temperature": (0.0,),
  "evaluate.every_epochs": (0,),
  "prune.form": ("prox",),
  "prune.select": ("all",),
  "prune.include": ("conv*", (1,), ("",)),
  "prune.exclude": (None,),
  "prune.min_width": (0,),
  "prune.round_to": (0,),
  "importance.compare": ("mean",),
  "importance.cost_exponent": (-0.1,),
  "search.start_epoch": (-1,),
  "search.end_epoch": (0,),
  "generator.data_share": (0.0,),
  "generator.temperature": (0.0,),
  "generator.bias": (NAN,),
  "generator.prior": ("generator",),
  "generator.prior_strength": (0.0,),
  "generator.order": ("",),
  "checkpoint.keep": (0,),
  "checkpoint.every_steps": (0,),
  "report.latency_batch_sizes": ((), (1.5,), (0,)),
  "report.page": ("yes",),
  "report.wandb_project": ("",),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_values_just_outside_are_refused(name, value):
  config = default.get_config()
  with config.ignore_type():
    config.update_from_flattened_dict({name: value})
  with pytest.raises(sapr.InputError, match=rf"{name} must be .+, got {re.escape(repr(value))}\.$"):
    check_config(config)


def test_a_configuration_that_lacks_a_field_is_refused():
  with pytest.raises(sapr.InputError, match="steps_per_call is missing in the configuration"):
    check_config(ConfigDict({"seed": 0}))
  with pytest.raises(sapr.InputError, match=r"config must be the ConfigDict of configs/default\.py, got a dict"):
    check_config({"seed": 0})


def test_a_field_that_is_unknown_is_refused_with_the_nearest_one():
  config = default.get_config().unlock()
  config.prune.gama = 3
  with pytest.raises(
    sapr.InputError, match=r"no other fields than these, got prune\.gama; did you mean prune\.gamma\?"
  ):
    check_config(config)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"train.epochs": 0}, r"prune\.start_epoch must be 0 where train\.epochs=0"),
    ({"prune.start_epoch": 200}, r"prune\.start_epoch must be at most train\.epochs - 1 = 199"),
    ({"search.start_epoch": 41}, r"search\.start_epoch must be at most prune\.start_epoch = 40, got 41"),
    ({"search.end_epoch": 40}, r"search\.end_epoch must be above prune\.start_epoch = 40, got 40"),
    ({"prune.latency_table": "times.json"}, r"prune\.latency_table must be unset unless prune\.cost=latency, got 'ti"),
    ({"data.validation_images": 9, "data.test_images": 8}, r"data\.test_images must be unset where .*, got 8"),
    ({"finetune.distillation.weight": 0.5, "prune.start_epoch": 0}, "must have a trained network to learn from"),
  ],
)
def test_fields_that_do_not_fit_together_are_refused(fields, message):
  config = default.get_config()
  config.update_from_flattened_dict(fields)
  with pytest.raises(sapr.InputError, match=message):
    check_config(config)


def test_a_cost_that_was_added_is_offered_with_its_table(monkeypatch):
  monkeypatch.setitem(COSTS, "energy", lambda graph, table: None)
  config = default.get_config()
  config.prune.latency_table = "times.json"
  with pytest.raises(sapr.InputError, match=r"must be unset unless prune\.cost=latency or energy, got 'times\.json'"):
    check_config(config)
  config.prune.cost = "energy"
  check_config(config)
  config.prune.cost = "flops"
  with pytest.raises(
    sapr.InputError, match=r"must be one of prunable_macs, macs, params, latency, energy, got 'flops'"
  ):
    check_config(config)
