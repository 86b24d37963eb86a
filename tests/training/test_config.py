"""The table of fields: every field has its rule, and every rule its field."""

from __future__ import annotations

import pytest
from ml_collections import ConfigDict

import sapr_jax as sapr
from configs import default
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


def test_a_configuration_that_lacks_a_field_is_refused():
  with pytest.raises(sapr.InputError, match="steps_per_call is missing in the configuration"):
    check_config(ConfigDict({"seed": 0}))
  with pytest.raises(sapr.InputError, match=r"config must be the ConfigDict of configs/default\.py, got a dict"):
    check_config({"seed": 0})
