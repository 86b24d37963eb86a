"""What benchmarks record and show, from made-up measurements."""

from __future__ import annotations

import copy
import json
import pathlib
import sys

import jax
import pytest

from benchmarks import device_time, measuring, pruned_speed, training_step

RESULTS = pathlib.Path(__file__).parents[2] / "results"


@pytest.fixture
def measured(monkeypatch, tmp_path):
  """Measures rows on a machine; returns what is then recorded."""

  def measure(machine, *rows):
    monkeypatch.setattr(measuring, "machine", lambda: machine)
    monkeypatch.setattr(sys, "argv", ["benchmark", *rows, "--quick", "--results", str(tmp_path)])
    measuring.measure_rows("", "some", "rows", {"a": 1, "b": 2}, lambda row, quick: {"row": row, "quick": quick})
    return json.loads((tmp_path / f"some_{machine['platform']}.json").read_text())["rows"]

  return measure


def test_rows_of_one_device_stand_together_whatever_processor_is_beside_it(measured):
  gpu = {"platform": "gpu", "device": "abacus", "versions": {}, "cpu": "one", "memory_gib": 1}
  assert list(measured(gpu, "b")) == ["b"]
  assert measured(gpu | {"cpu": "other", "memory_gib": 2}, "a") == {
    "a": {"row": 1, "quick": True},
    "b": {"row": 2, "quick": True},
  }
  assert list(measured(gpu | {"device": "slide rule"}, "a")) == ["a"]
  cpu = gpu | {"platform": "cpu", "cores": 1, "python": "3"}
  assert list(measured(cpu, "b")) == ["b"]
  assert list(measured(cpu | {"cpu": "other"}, "a")) == ["a"]


@pytest.mark.parametrize("text", ["{", '{"x": 1}'])
def test_a_damaged_record_is_refused_and_kept(text, measured, tmp_path):
  (tmp_path / "some_gpu.json").write_text(text)
  with pytest.raises(SystemExit, match=r"error: .*some_gpu.json is damaged or of something else; move it away$"):
    measured({"platform": "gpu", "device": "abacus", "versions": {}}, "a")
  assert (tmp_path / "some_gpu.json").read_text() == text


def test_without_pytorch_there_is_a_note(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "torch", None)
  monkeypatch.delitem(sys.modules, "benchmarks.torch_peer", raising=False)
  monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
  assert measuring.torch_peer() is None
  assert capsys.readouterr().err.startswith("note: without PyTorch, which cannot be imported: import of torch halted")


def test_a_peer_that_fails_is_left_out(capsys):
  def fail():
    raise RuntimeError("no\nkernel")

  good = list
  assert measuring.attempt("good", lambda: good) == {"good": good}
  assert measuring.attempt("makes nothing", fail) == measuring.attempt("does nothing", lambda: fail) == {}
  assert "note: without does nothing, which failed: no kernel" in capsys.readouterr().err


def test_tables_and_goals_without_pytorch():
  steps = {"ours": [2.0, 1.0, 3.0]}
  row = {"title": "A", "batch": 10, "dtype": "float32", "macs": 5, "matmul_rate": 100.0, "goal": 1.0}
  table, goals = training_step.parts("gpu", {"rows": {"a": row | {"peer": [], "seconds_per_step": steps}}})
  assert goals == "" and table.endswith("| A, batch 10, float32 | 2000 |  | 75.0% |")
  report = json.loads((RESULTS / "pruned_speed_cpu.json").read_text())
  with_peer, report = pruned_speed.parts("cpu", report), copy.deepcopy(report)
  for network in report["networks"].values():
    for found in network["times"]["float32"].values():
      del found["pytorch_over_ours"]
      for part in ("milliseconds", "speed_up"):
        found[part] = {name: x for name, x in found[part].items() if "orch" not in name}
  without = pruned_speed.parts("cpu", report)
  assert "PyTorch, dense" in with_peer[1] and "PyTorch" not in without[1]
  assert without[1] == "\n".join(line for line in with_peer[1].split("\n") if "orch" not in line)


def plane(name, **lines):
  """A plane of a trace, as text: `lines` are named after their streams and hold (start, length, what) in ns."""
  whats = sorted({what for events in lines.values() for _, _, what in events})
  text = "".join(f'event_metadata {{ key: {i} value {{ id: {i} name: "{what}" }} }}' for i, what in enumerate(whats, 1))
  for line, events in lines.items():
    text += f'lines {{ name: "{line.replace("_", " ")}" timestamp_ns: 1000 '
    for start, length, what in events:
      text += (
        f"events {{ metadata_id: {whats.index(what) + 1} offset_ps: {1000 * start} duration_ps: {1000 * length} }}"
      )
    text += "}"
  return f'planes {{ name: "{name}" {text} }}'


def test_a_trace_shows_when_a_device_was_idle():
  activity = lambda *planes: device_time.device_activity(jax.profiler.ProfileData.from_text_proto("".join(planes)))  # noqa: E731
  host = plane("/host:CPU", python=[(0, 500, "work")])
  # 0 to 30 and 20 to 40 overlap, 60 to 100 follows; the copy to the device fills no gap, nor do derived lines.
  compute = [(0, 30, "fusion.1"), (60, 40, "fusion_2")]
  streams = {"Stream_13": compute, "Stream_14": [(20, 20, "conv"), (40, 20, "MemcpyH2D")], "XLA_Ops": [(0, 100, "x")]}
  found = activity(host, plane("/device:GPU:0", **streams))
  assert found["idle"] == pytest.approx(0.2)
  assert found["operations"] == pytest.approx({"fusion": 70 / 90, "conv": 20 / 90}, abs=1e-4)
  found = activity(
    host, plane("/device:TPU:0", XLA_Modules=[(0, 100, "m")], XLA_Ops=[(0, 50, "%dot.3 = f32"), (75, 25, "y")])
  )
  assert found["idle"] == pytest.approx(0.25) and found["operations"] == pytest.approx(
    {"dot": 2 / 3, "y": 1 / 3}, abs=1e-4
  )
  assert activity(host) is None
