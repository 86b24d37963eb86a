"""Records: what is appended, and what is dropped when a run resumes."""

from __future__ import annotations

import json

from sapr_jax.artifacts import Recorder, read_records


def record(step, **more):
  return {"stage": "train", "epoch": step, "step": step, "loss": 1.0 / step, **more}


def test_records_are_lines_of_json(tmp_path):
  recorder = Recorder(tmp_path)
  recorder.write(record(1))
  recorder.write(record(2, widths={"a": 3}))
  recorder.close()
  lines = (tmp_path / "records.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == read_records(tmp_path) == [record(1), record(2, widths={"a": 3})]


def test_a_resumed_run_drops_the_epochs_that_no_checkpoint_holds(tmp_path):
  recorder = Recorder(tmp_path)
  for step in (1, 2, 3):
    recorder.write(record(step))
  recorder.close()
  recorder = Recorder(tmp_path)
  recorder.rewind(2)
  assert read_records(tmp_path) == [record(1), record(2)]
  recorder.write(record(3))
  recorder.close()
  assert [r["step"] for r in read_records(tmp_path)] == [1, 2, 3]


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
  (tmp_path / "records.jsonl").write_text(json.dumps(record(1)) + '\n{"stage": "tr')
  assert read_records(tmp_path) == [record(1)]


def test_what_follows_damage_is_left_out(tmp_path):
  for damage in (b"\xff\x00\n", b"[1]\n", b"{}\n"):
    (tmp_path / "records.jsonl").write_bytes(json.dumps(record(1)).encode() + b"\n" + damage + b'{"step": 2}\n')
    assert read_records(tmp_path) == [record(1)]


def test_no_file_means_no_records(tmp_path):
  assert read_records(tmp_path) == []
