"""Times of layers, measured: the table of a tiny network, its file, and runs with a budget in it."""

from __future__ import annotations

import dataclasses
import json
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_run import small_config

import sapr_jax as sapr
from sapr_jax.method import TimedLayer
from sapr_jax.training import build, latency, table_for

MODEL = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3), nn.relu, nn.Dense(2)])
VARIABLES = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 5)))
GRAPH = sapr.trace_channels(MODEL, VARIABLES, (1, 5), select="unjoined")


@pytest.fixture(scope="module")
def table():
  return sapr.measure_latency(MODEL, VARIABLES, GRAPH, batch_size=2)


def test_a_table_has_every_layer_in_its_widths_and_tells_its_error(table):
  assert [layer.layer for layer in table.layers] == [
    f"dot_general float32[2,{a}] float32[{a},{b}]" for a, b in ((5, 4), (4, 3), (3, 2))
  ]
  assert [[row.tolist() for row in layer.widths] for layer in table.layers] == [
    [[1, 2, 3, 4]], [[1, 2, 3, 4], [1, 2, 3]], [[1, 2, 3]],
  ]  # fmt: skip
  assert {name: table.about[name] for name in ("batch_size", "dtype", "inputs", "macs", "platform")} == {
    "batch_size": 2,
    "dtype": "float32",
    "inputs": "float32[1,5]",
    "macs": 5 * 4 + 4 * 3 + 3 * 2,
    "platform": jax.default_backend(),
  }
  assert table.networks[0]["widths"] == [4, 3] and table.networks[1]["widths"] == [1, 1]
  assert all(known["milliseconds"] > 0 and known["predicted"] > 0 for known in table.networks)
  cost = sapr.latency_cost(GRAPH, table)
  budget = sapr.make_budget(GRAPH, cost, share=1.0)
  masks = sapr.project_to_budget(GRAPH, {group.name: np.arange(group.size) for group in GRAPH.groups}, budget)
  assert all(mask.all() for mask in masks.values())


def test_a_module_of_nnx_is_measured_without_variables(monkeypatch):
  for name in ("_LayerTimer", "_NetworkTimer"):
    monkeypatch.setattr(latency, name, lambda piece, widths: types.SimpleNamespace(run=lambda: None, best=1e-3))
  rngs = nnx.Rngs(0)
  module = nnx.Sequential(nnx.Linear(5, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 2, rngs=rngs))
  graph = sapr.trace_channels(module, jnp.zeros((1, 5)), select="unjoined")
  found = sapr.measure_latency(module, graph, batch_size=2)
  assert found.about["batch_size"] == 2 and list(found.groups.values()) == [4]
  assert sapr.measure_latency(module, None, graph, batch_size=2).to_json() == found.to_json()
  with pytest.raises(sapr.InputError, match=r"^graph must be a ChannelGraph in measure_latency\(module, graph\), got"):
    sapr.measure_latency(module, {"params": {}}, graph)


def test_a_table_is_written_and_read(table, tmp_path):
  sapr.write_latency_table(tmp_path / "times.json", table)
  assert sapr.read_latency_table(tmp_path / "times.json").to_json() == table.to_json()
  document = json.loads((tmp_path / "times.json").read_text())
  document["offset"] += 1
  (tmp_path / "times.json").write_text(json.dumps(document))
  with pytest.raises(sapr.InputError, match=r"its SHA-256 must be that of its entries, .* edited; measure it again"):
    sapr.read_latency_table(tmp_path / "times.json")
  del document["sha256"]  # of one by hand
  (tmp_path / "times.json").write_text(json.dumps(document))
  assert sapr.read_latency_table(tmp_path / "times.json").offset == table.offset + 1


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1', '{"format": 1, "about": 3}'])
def test_a_file_that_is_no_table_is_refused(content, tmp_path):
  (tmp_path / "times.json").write_text(content)
  with pytest.raises(sapr.InputError, match=r"times\.json is damaged or is no latency table: .+; measure it again"):
    sapr.read_latency_table(tmp_path / "times.json")
  with pytest.raises(sapr.InputError, match=r"missing\.json is missing; `sapr latency MODEL missing\.json`"):
    sapr.read_latency_table(tmp_path / "missing.json")


def test_a_table_of_another_batch_or_dtype_is_refused(table, tmp_path):
  sapr.write_latency_table(tmp_path / "times.json", table)
  network = (MODEL, VARIABLES, GRAPH)
  with pytest.raises(sapr.InputError, match=r"times\.json must be of batch_size 1, got 2; measure it again"):
    table_for(*network, path=tmp_path / "times.json", batch_size=1)
  with pytest.raises(sapr.InputError, match="must be of dtype bfloat16, got float32"):
    table_for(*network, path=tmp_path / "times.json", dtype="bfloat16")
  assert table_for(*network, path=tmp_path / "times.json", batch_size=2).to_json() == table.to_json()


def test_widths_are_measured_all_up_to_64_and_then_at_steps():
  assert list(latency._grid((3,))) == [(1,), (2,), (3,)]
  assert [width for (width,) in latency._grid((64,))] == list(range(1, 65))
  assert [width for (width,) in latency._grid((144,))][:5] == [1, 16, 17, 32, 33]
  assert list(latency._grid(())) == [()]
  assert list(latency._grid((2, 2))) == [(1, 1), (1, 2), (2, 1), (2, 2)]
  assert len(list(latency._grid((512, 64)))) == 9 * 9
  assert list(latency._grid((2, 3, 2))) == [(2, 3, 2), (1, 3, 2), (2, 1, 2), (2, 2, 2), (2, 3, 1)]


@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_offset_and_scale_are_those_that_whole_networks_show(offset):
  rows = [np.arange(1, size + 1) for size in (4, 3)]
  layers = tuple(
    TimedLayer("dot", ((group.name,),), (row,), row.astype(float))
    for group, row in zip(GRAPH.groups, rows, strict=True)
  )
  about = {"device": "abacus", "batch_size": 1, "dtype": "float32", "inputs": "float32[1,5]", "macs": GRAPH.macs()}
  plain = sapr.LatencyTable(about, {group.name: group.size for group in GRAPH.groups}, layers, 0.0, 1.0, ())
  networks = [[4, 3], [1, 1], [2, 2], [3, 1]]
  found = latency._calibrated(plain, GRAPH, networks, [offset + 1.5 * sum(widths) for widths in networks])
  assert (found.offset, found.scale) == (pytest.approx(offset, abs=1e-9), pytest.approx(1.5))
  assert all(known["predicted"] == pytest.approx(known["milliseconds"]) for known in found.networks)


@pytest.mark.slow
def test_a_run_measures_or_is_given_a_table_and_keeps_to_it(tmp_path, monkeypatch):
  for name in ("_LayerTimer", "_NetworkTimer"):
    monkeypatch.setattr(latency, name, lambda piece, widths: types.SimpleNamespace(run=lambda: None, best=1e-3))
  experiment = build(small_config(prune__cost="latency", prune__p=1.0, prune__latency_batch_size=4))
  table = experiment.budget.cost.table
  assert table.about["batch_size"] == 4 and experiment.budget.limit == pytest.approx(experiment.budget.full)
  # With a time of one millisecond for each channel, half the time is half the channels.
  groups, rows = experiment.graph.groups, [np.arange(1, size + 1) for size in table.groups.values()]
  layers = [TimedLayer("conv", ((g.name,),), (row,), row.astype(float)) for g, row in zip(groups, rows, strict=True)]
  by_hand = dataclasses.replace(table, layers=tuple(layers), offset=0.0, scale=1.0)
  path, workdir = tmp_path / "times.json", tmp_path / "run"
  sapr.write_latency_table(path, by_hand)
  config = small_config(prune__cost="latency", prune__p=0.5, prune__latency_table=str(path))
  result = sapr.run(config, workdir)
  assert sum(result.summary["run"]["widths"].values()) == sum(table.groups.values()) // 2
  record = [record for record in result.records if "cost_share" in record][-1]
  assert (record["cost"], record["cost_share"]) == ("latency_ms", 0.5)
  # A run that goes on has its table in the work directory.
  path.unlink()
  assert sapr.read_latency_table(workdir / "latency.json").to_json() == by_hand.to_json()
  assert build(config, workdir).budget.limit == sum(table.groups.values()) / 2
  with pytest.raises(sapr.InputError, match=r"times\.json is missing"):
    build(config)
