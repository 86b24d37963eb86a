"""Records: what is appended, and what is dropped when a run resumes."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

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


def test_pytorch_is_not_imported_by_the_way(tmp_path):
  program = (
    "import pathlib, sys; from sapr_jax.artifacts import Recorder; Recorder(pathlib.Path()).rewind(0);"
    " assert 'tensorboardX' in sys.modules; print('torch' in sys.modules)"
  )
  done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
  assert done.stdout == "False\n", done.stderr


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path, capsys):
  (tmp_path / "records.jsonl").write_text(json.dumps(record(1)) + '\n{"stage": "tr')
  assert read_records(tmp_path) == [record(1)]
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
  "line", [b"{", b"[]", b"{}", b'{"step": "2"}', b'{"step": true}', b"[" * 10**5, b"\xff\0", b'{"step": ' + b"9" * 5000]
)
def test_a_damaged_line_is_named_and_the_others_kept(tmp_path, line, capsys):
  lines = [json.dumps(record(1, note="\u2028\x0c"), ensure_ascii=False).encode(), line, b'{"step": 3}', b""]
  (tmp_path / "records.jsonl").write_bytes(b"\n".join(lines))
  assert read_records(tmp_path) == [record(1, note="\u2028\x0c"), {"step": 3}]
  assert capsys.readouterr().err == f"warning: {tmp_path}/records.jsonl is damaged in line 2, left out\n"


def test_records_that_a_checkpoint_implies_and_the_file_lacks_are_named(tmp_path, capsys):
  for lacking, text in (((2,), "epoch 2;"), ((1, 2, 4), "3 epochs from 1 to 4;")):
    present = [record(step) for step in range(1, 6) if step not in lacking]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in present))
    recorder = Recorder(tmp_path)
    recorder.name_lost(1, 4)
    assert f"records.jsonl has lost the records of {text} the run goes on without" in capsys.readouterr().err
    recorder.name_lost(5, 5)
    assert capsys.readouterr().err == ""


def test_a_number_that_json_does_not_have_is_not_written(tmp_path):
  with pytest.raises(ValueError, match="not JSON compliant"):
    Recorder(tmp_path).write(record(1, bad=float("inf")))


def test_tensorboard_shows_the_numbers(tmp_path):
  recorder = Recorder(tmp_path)
  recorder.rewind(1)
  recorder.write(record(2, widths={"a": 3}))
  recorder.close()
  (file,) = (tmp_path / "tensorboard").iterdir()
  content, events = file.read_bytes(), []
  while content:  # length, its checksum, the event, its checksum
    (length,) = struct.unpack("<Q", content[:8])
    events.append(Event.FromString(content[12 : 12 + length]))
    content = content[16 + length :]
  version, start, loss = events
  assert version.file_version == "brain.Event:2"
  assert start.session_log.status == SessionLog.START and start.step == 2  # what older files say from there on is void
  assert loss.step == 2 and [(v.tag, v.simple_value) for v in loss.summary.value] == [("train/loss", 0.5)]


def test_no_file_means_no_records(tmp_path):
  assert read_records(tmp_path) == []
