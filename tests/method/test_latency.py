"""Budgets in latency: tables by hand, in which a step of the hardware decides."""

from __future__ import annotations

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapr_jax as sapr
from sapr_jax.method import LatencyTable
from sapr_jax.method.latency import _every_width

MODEL = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(8), nn.relu, nn.Dense(2)])
VARIABLES = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 3)))
STEPS = [1.0, 2, 2, 2, 4, 4.1, 4.2, 4.3]
"""Milliseconds of 1 to 8 channels: a step at 2, and one at 5."""
FALLING = [1.0, 5, 5, 3, 6, 6, 6, 6]
"""Four channels take less than two."""


@pytest.fixture(scope="module")
def graph():
  """Groups a and b of 8 channels each, which meet in the layer between."""
  found = sapr.trace_channels(MODEL, VARIABLES, (1, 3), select="unjoined")
  assert [group.size for group in found.groups] == [8, 8]
  return found


def document(graph, layers, **known):
  a, b = (group.name for group in graph.groups)
  names = {"a": a, "b": b}
  rows = []
  for groups, widths, times in layers:
    uses = [[names[group] for group in groups]]
    rows.append({"layer": "dot", "uses": uses, "widths": widths, "milliseconds": times})
  about = {"device": "abacus", "batch_size": 4, "dtype": "float32", "inputs": "float32[1,3]", "macs": graph.macs()}
  head = {"format": 1, "about": about, "groups": {a: 8, b: 8}, "offset": 0.5, "scale": 2.0, "networks": []}
  return head | {"layers": rows} | known


def table(graph, *layers, **known):
  return LatencyTable.from_json(json.loads(json.dumps(document(graph, layers, **known))))


WIDTHS = list(range(1, 9))


def test_times_of_layers_are_added_by_hand(graph):
  cost = sapr.latency_cost(
    graph,
    table(
      graph, ("a", [WIDTHS], STEPS), ("b", [[1, 4, 8]], [1, 4, 6]), ("", [], 3), ("ab", [[1, 8]] * 2, [[1, 2], [3, 9]])
    ),
  )
  assert cost.name == "latency_ms"
  kept = np.array([4, 6], np.int64)
  # Of `ab`: a is 3/7 of the way, b 5/7.
  both = (1 * 2 + 2 * 5) / 7 * 4 / 7 + (3 * 2 + 9 * 5) / 7 * 3 / 7
  assert cost(kept) == pytest.approx(0.5 + 2 * (2 + 5 + 3 + both)) == cost.time(kept)
  assert isinstance(cost(kept), float)


def test_multiples_of_eight_are_told_from_what_is_between_them():
  times = _every_width(48, np.array([1, 16, 17, 32, 33, 48]), np.array([2.0, 4, 6, 8, 10, 12]))
  assert times[[1, 16, 17, 32, 33, 48]].tolist() == [2, 4, 6, 8, 10, 12]
  assert times[[24, 40]].tolist() == [6, 10]  # on the line of 16, 32 and 48
  assert times[10] == pytest.approx(2 + 2 * 9 / 15)  # below the first multiple nothing else is known
  # 17 is 6 / 4.25 times as slow as a multiple would be, 33 is 10 / 8.25 times.
  assert times[25] == pytest.approx(6.25 * (6 / 4.25 + 10 / 8.25) / 2)
  assert times[47] == pytest.approx(11.75 * 10 / 8.25)


def test_the_cost_never_falls_and_is_the_time_of_a_network_at_least_as_wide(graph):
  cost = sapr.latency_cost(graph, table(graph, ("a", [WIDTHS], FALLING), offset=0, scale=1))
  at = [np.array([width, 8]) for width in WIDTHS]
  assert [cost(kept) for kept in at] == [1, 3, 3, 3, 6, 6, 6, 6]
  assert [cost.time(kept) for kept in at] == FALLING


def test_its_slope_leads_over_a_plateau(graph):
  cost = sapr.latency_cost(graph, table(graph, ("a", [WIDTHS], STEPS), ("b", [[1, 8]], [1, 8]), offset=0, scale=1))
  kept = jnp.array([3.0, 6.5])
  value, slope = jax.jit(jax.value_and_grad(cost))(kept)
  np.testing.assert_allclose(value, 2 + 6.5, rtol=1e-6)
  np.testing.assert_allclose(slope, [(4.2 - 1) / 7, (8 - 2.5) / 5.5], rtol=1e-5)  # over four channels on each side
  assert cost(jnp.array([3, 8], jnp.int32)) == 10


def test_the_projection_stops_below_a_step_and_fills_what_is_free(graph):
  times = table(graph, ("a", [WIDTHS], STEPS), ("b", [[1, 8]], [1, 8]), offset=0, scale=1)
  cost = sapr.latency_cost(graph, times)
  a, b = (group.name for group in graph.groups)
  # The fifth channel of a ranks before the fourth of b, but costs as much as two of b.
  scores = {a: [9, 8, 7, 5, 4.5, 0.4, 0.3, 0.2], b: [9, 8, 6, 4, 3.5, 2, 1, 0.1]}
  masks = sapr.project_to_budget(graph, scores, sapr.make_budget(graph, cost, amount=7.5))
  assert [int(masks[name].sum()) for name in (a, b)] == [4, 5]
  # Channels 2 to 4 of a come together, and are worth their mean, 3: less than the fifth of b, more than its sixth.
  scores[a][1:5] = [7, 1, 1, 0.5]
  for amount, widths in ((4, [1, 3]), (6, [1, 5]), (7, [4, 5])):
    masks = sapr.project_to_budget(graph, scores, sapr.make_budget(graph, cost, amount=amount))
    assert [int(masks[name].sum()) for name in (a, b)] == widths
    assert cost(graph.kept(masks)) == cost.time(graph.kept(masks)) == amount


@pytest.mark.parametrize("seed", range(3))
def test_the_budget_is_met_by_the_time_itself(graph, seed):
  rng = np.random.default_rng(seed)
  times = [("a", [WIDTHS], (1 + rng.random(8)).tolist()), ("b", [WIDTHS], (1 + np.sort(rng.random(8))).tolist())]
  cost = sapr.latency_cost(graph, table(graph, *times))
  budget = sapr.make_budget(graph, cost, share=0.9)
  scores = {group.name: rng.normal(size=8) for group in graph.groups}
  kept = graph.kept(sapr.project_to_budget(graph, scores, budget))
  assert cost.time(kept) == pytest.approx(cost(kept)) and cost(kept) <= budget.limit
  for k, step in enumerate(np.eye(2, dtype=np.int64)):
    assert kept[k] == 8 or cost(kept + step) > budget.limit


def test_groups_that_are_left_out_stay_whole(graph):
  known = table(graph, ("a", [WIDTHS], STEPS), ("ab", [WIDTHS] * 2, np.add.outer(WIDTHS, WIDTHS).tolist()))
  less = sapr.trace_channels(MODEL, VARIABLES, (1, 3), select="unjoined", include=graph.groups[0].name)
  cost = sapr.latency_cost(less, known)
  assert cost(np.array([4])) == 0.5 + 2 * (2 + 4 + 8)


def test_a_table_of_something_else_is_refused(graph):
  good = document(graph, [("a", [WIDTHS], STEPS)])
  for change, message in (
    ({"macs": 7}, r"table must be of a network of macs \d+, got one of macs 7; measure it again\."),
    ({"inputs": "float32[1,4]"}, r"of inputs float32\[1,3\], got one of inputs float32\[1,4\]"),
  ):
    other = LatencyTable.from_json(good | {"about": good["about"] | change})
    with pytest.raises(sapr.InputError, match=message):
      sapr.latency_cost(graph, other)
  known = document(graph, [("a", [WIDTHS], STEPS)], groups={graph.groups[0].name: 8})
  with pytest.raises(sapr.InputError, match=r"must have the channel group '.+' of 8 channels, got none"):
    sapr.latency_cost(graph, LatencyTable.from_json(known))


@pytest.mark.parametrize("change", [{"format": 2}, {"about": 3}, {"layers": 3}, {"networks": [3]}, {"groups": 3}])
def test_a_document_that_is_no_table_is_refused(graph, change):
  good = document(graph, [("a", [WIDTHS], STEPS)])
  assert LatencyTable.from_json(good).to_json() == good
  with pytest.raises(sapr.InputError, match=r"^document must be what LatencyTable.to_json returned"):
    LatencyTable.from_json(good | change)


@pytest.mark.parametrize(
  ("layer", "message"),
  [
    (([[1, 8]], [1, -2]), r"The times of layer 'dot' must be numbers above 0, got -2\.0"),
    (([[1, 8]], [1, float("nan")]), "above 0, got nan"),
    (([[1, 8]], [1]), r"The times of layer 'dot' must be \(2,\), one for each width, got \(1,\)"),
    (([[1, 5, 5, 8]], [1] * 4), r"The widths of layer 'dot' must be integers that rise from 1, got \[1, 5, 5, 8\]"),
    (([[1, 7.5, 8]], [1] * 3), r"integers that rise from 1, got \[1\.0, 7\.5, 8\.0\]"),
    (([[2, 8]], [1, 2]), r"rise from 1, got \[2, 8\]"),
    (([[]], []), r"rise from 1, got \[\]"),
    (([[1, 9]], [1, 2]), r"must end at those of groups \('.*',\), \[8\], got \[9\]"),
    (([[1, 8], [1, 8]], [[1, 2], [3, 4]]), r"\[8\], got \[8, 8\]"),
  ],
)
def test_times_that_cannot_be_are_refused(graph, layer, message):
  with pytest.raises(sapr.InputError, match=message):
    table(graph, ("a", *layer))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"layers": []}, "layers must be those of a network, got none"),
    ({"scale": 0.0}, r"scale must be a number above 0, got 0\.0"),
    ({"offset": float("nan")}, "offset must be a number of at least 0, got nan"),
    ({"about": {"device": 3}}, "device must be text, got 3"),
    ({"about": {"dtype": "real"}}, "dtype must be a dtype"),
    ({"about": {"batch_size": 1.5}}, r"batch_size must be an integer of at least 1, got 1\.5"),
    ({"networks": [{"widths": [8, 9]}]}, r"The widths of a network must be from 1 .*, got \[8, 9\]"),
    (
      {"networks": [{"widths": [8, 8], "milliseconds": 0, "predicted": 1}]},
      "The milliseconds of a network must be a number above 0, got 0",
    ),
  ],
)
def test_other_entries_of_a_table_are_checked(graph, change, message):
  good = document(graph, [("a", [WIDTHS], STEPS)])
  if "about" in change:
    change = {"about": good["about"] | change["about"]}
  with pytest.raises(sapr.InputError, match=message):
    LatencyTable.from_json(good | change)


def test_a_table_says_what_it_is_of(graph):
  with pytest.raises(sapr.InputError, match=r"^about must have device, .*macs, got none of device, .*macs\.$"):
    LatencyTable.from_json(document(graph, [("a", [WIDTHS], STEPS)]) | {"about": {}})


def test_a_group_has_an_integer_width(graph):
  groups = {group.name: size for group, size in zip(graph.groups, (8.0, 8), strict=True)}
  with pytest.raises(sapr.InputError, match=r"The width of group '.*' must be an integer of at least 1, got 8\.0"):
    LatencyTable.from_json(document(graph, [("b", [WIDTHS], STEPS)], groups=groups))
