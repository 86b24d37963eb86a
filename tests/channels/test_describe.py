"""What a channel graph prints: short, within 100 columns, and with the right numbers."""

from __future__ import annotations

import dataclasses

import laws
import networks
import pytest

from sapr_jax import models
from sapr_jax.channels import trace_channels
from sapr_jax.channels.describe import alike, macs_shares


def graph_of(name, shape, select="blocks"):
  model = models.create(name)
  return trace_channels(model, laws.abstract_variables(model, shape), shape, select=select)


@pytest.fixture(scope="module")
def resnet50():
  return graph_of("resnet50", (1, 224, 224, 3))


def test_a_deep_network_has_a_line_for_each_group(resnet50):
  lines = str(resnet50).splitlines()
  assert lines[0] == "32 channel groups, 4,089,184,256 MACs, 3,609,460,736 in layers that touch them"
  assert len(lines) == 2 + 32
  # conv1 reads 64 channels in 56x56 pixels, and a 3x3 convolution follows: 56^2 * 64 * (64 + 9 * 64) MACs of 4.09e9.
  assert lines[2] == "stage1_block1/conv1        64     3.1%  no      conv1 out, bn1, conv2 in"


def test_reasons_are_given_once_each(resnet50):
  assert resnet50.explain().splitlines() == [
    "it can be cut exactly, but select='blocks' leaves it out:",
    "  conv, stage*_block*/conv* (16), stage*_block*/shortcut (4)",
    "it is the network's output:",
    "  fc",
  ]
  assert len(resnet50.fixed) == 22


def test_residual_streams_fit_the_line():
  text = str(graph_of("mobilenetv2", (1, 224, 224, 3), "exact"))
  assert max(map(len, text.splitlines())) <= 100
  assert "expand out, depthwise out, project in, ..." in text
  stream = next(line for line in text.splitlines() if line.startswith("stage4_block1/project"))
  assert "  yes     stage*_block*/project out (4), " in stream


def test_long_names_fit_the_line():
  model = networks.TwoDense()
  graph = trace_channels(model, laws.abstract_variables(model, (1, 3)), (1, 3), select="unjoined")
  (group,) = graph.groups
  members = tuple(dataclasses.replace(m, path=("encoder" * 9, *m.path)) for m in group.members)
  long = dataclasses.replace(graph, groups=(dataclasses.replace(group, name="module/" * 20 + "up", members=members),))
  line = str(long).splitlines()[-1]
  assert len(line) <= 100
  assert line.startswith("...") and line.endswith("2 modules")


def test_a_share_counts_all_layers_that_touch_the_group():
  model = networks.TwoDense()
  graph = trace_channels(model, laws.abstract_variables(model, (1, 3)), (1, 3), select="unjoined")
  assert macs_shares(graph) == [1]


def test_names_that_differ_in_their_numbers_are_one():
  assert alike(["stem", "b1/conv2", "b2/conv2", "b10/conv1"]) == ["stem", "b*/conv* (3)"]
  assert alike(["up1", "up2"]) == ["up1", "up2"]
  assert alike([]) == []
