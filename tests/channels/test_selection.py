"""Groups chosen by patterns of their names."""

from __future__ import annotations

import re

import laws
import pytest

from sapr_jax import models
from sapr_jax.channels import trace_channels
from sapr_jax.errors import InputError

MODEL = models.create("resnet8", width_multiplier=0.25)
VARIABLES = laws.abstract_variables(MODEL)
NAMES = [f"stage{stage}_block1/conv1" for stage in (1, 2, 3)]


def trace(**choice):
  return trace_channels(MODEL, VARIABLES, laws.SHAPE, **choice)


@pytest.mark.parametrize(
  ("choice", "places"),
  [
    ({}, [0, 1, 2]),
    ({"include": "stage2_block1/conv1"}, [1]),
    ({"include": "stage2_block1"}, [1]),  # the module
    ({"include": "stage2_*"}, [1]),
    ({"include": "*/conv1"}, [0, 1, 2]),
    ({"include": ["stage1*", "stage3*"]}, [0, 2]),
    ({"exclude": "stage1_block1/*"}, [1, 2]),
    ({"include": "stage[12]*", "exclude": ("stage1*",)}, [1]),  # what is excluded stays so
    ({"include": "stage1*", "select": lambda group: group.size < 16}, [0]),
  ],
)
def test_patterns_choose(choice, places):
  assert [group.name for group in trace(**choice).groups] == [NAMES[place] for place in places]


def test_costs_and_reasons_are_those_of_the_groups_that_are_left():
  graph, alone = trace(exclude="stage1*"), trace(select=lambda group: group.name in NAMES[1:])
  assert graph.prunable_macs() == alone.prunable_macs() < trace().prunable_macs()
  reason = "it can be cut exactly, but select='blocks', exclude='stage1*' leaves it out"
  assert (("params", "stage1_block1", "conv1", "kernel"), 3, reason) in graph.fixed


@pytest.mark.parametrize(
  ("choice", "message"),
  [
    (
      {"include": "stage2_block1/conv9"},
      r"include must match .*'stage2_block1/conv9', .*close are .*stage2_block1/conv1, ",
    ),
    ({"exclude": ("stage1*", "Stage2*")}, r"exclude must match .*'Stage2\*'"),
    ({"include": 3}, r"include must be a glob such as 'encoder/\*', or a sequence of globs, got 3\."),
    ({"exclude": [None]}, r"exclude must be a glob .*, got \[None\]\."),
    ({"exclude": "stage*"}, r"select='blocks', exclude='stage\*' finds no channel group to prune"),
  ],
)
def test_patterns_that_cannot_be_meant(choice, message):
  with pytest.raises(InputError) as info:
    trace(**choice)
  assert re.search(message, str(info.value))
  assert "\n" not in str(info.value)
