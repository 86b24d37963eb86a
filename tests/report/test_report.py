"""The line of an epoch, the table at the end, and latency."""

from __future__ import annotations

from sapr_jax import report


def test_the_line_of_an_epoch():
  plain = {"stage": "train", "epoch": 3, "train_loss": 0.5, "test_accuracy": 0.9, "weight_seconds": 12.0}
  assert report.format_epoch(plain, 20) == "train 3/20: loss 0.5000, test accuracy 90.00%, 12.0 s"
  searched = plain | {
    "subnetwork_accuracy": 0.8,
    "cost": "prunable_macs",
    "cost_share": 0.479,
    "kept_norm_mean": 1.5,
    "dropped_norm_mean": 0.25,
    "hamming_distance": 0.01,
    "generator_seconds": 1.0,
  }
  assert report.format_epoch(searched, 20) == (
    "train 3/20: loss 0.5000, test accuracy 90.00% (80.00% if cut now), dropped channels shrunk to 17%,"
    " choice changed 1.0%, 13.0 s"
  )


def test_costs_have_names_that_a_reader_expects():
  words = {"prunable_macs": "the prunable MACs", "macs": "the network's MACs", "params": "the parameters"}
  words |= {"latency": "the latency", "latency_ms": "the latency"}
  assert {name: report.cost_in_words(name) for name in [*words, "energy_mj"]} == words | {"energy_mj": "energy_mj"}


def test_the_table():
  def row(accuracy, macs, params, latency):
    return {"accuracy": accuracy, "macs": macs, "params": params, "latency_ms": {"1": latency}}

  summary = {
    "dense": row(0.95, 2_000_000, 12345, 1.0),
    "subnetwork": row(0.8, 1_000_000, 6000, 0.5),
    "pruned": row(0.949, 1_000_000, 6000, 0.5),
  }
  assert report.format_summary(summary) == "\n".join(
    [
      "network                          accuracy     MACs  of dense  parameters  ms, batch 1  speed-up",
      "-----------------------------------------------------------------------------------------------",
      "dense                              95.00%  2.000 M    100.0%      12,345         1.00     1.00x",
      "sub-network, before fine-tuning    80.00%  1.000 M     50.0%       6,000         0.50     2.00x",
      "pruned, after fine-tuning          94.90%  1.000 M     50.0%       6,000         0.50     2.00x",
    ]
  )
  untuned = report.format_summary({**summary, "run": {"finetune_epochs": 0}}).splitlines()
  assert [line.split("  ")[0] for line in untuned[2:]] == ["dense", "pruned"]
  assert report.headlines(summary) == [
    ("50.0%", "of the MACs are left", "2.000 M → 1.000 M for an image"),
    ("94.90%", "accuracy", "95.00% → 94.90%, -0.10 points"),
    ("48.6%", "of the parameters are left", "12,345 → 6,000"),
    ("2.00×", "as fast, 1 image at a time", "1.00 ms → 0.50 ms"),  # noqa: RUF001
  ]


def test_latency_and_memory_are_measured_for_each_network(tiny):
  networks = {"a": (tiny.model, tiny.variables), "b": (tiny.model, tiny.variables)}
  found = report.compare_programs(networks, tiny.input_shape, 3, repeats=2)
  assert found.keys() == {"a", "b"}
  for measured in found.values():
    low, high = measured["quartiles_ms"]
    assert 0 < low <= measured["latency_ms"] <= high and measured["memory_bytes"] > 0


def test_the_versions_name_what_numbers_depend_on():
  versions = report.versions()
  assert versions.keys() >= {"python", "jax", "jaxlib", "flax", "sapr_jax"}
  assert all(isinstance(version, str) and version for version in versions.values())
